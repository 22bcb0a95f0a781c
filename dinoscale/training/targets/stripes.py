"""The files of stored targets, and what they hold of a micro-batch.

The images of a step's global batch that one forward takes are a slot. A file holds a slot of some
consecutive steps, a stripe: how many ranks there are decides who writes or reads it, not what it
holds. It is a safetensors file; of each step it has

    STEP.images    int64 (B,)       their numbers in data.train, as drawn: an unreadable one's, too
    STEP.crops     int64 (B,)       CRC-32 of the pixels of their global crops and what was drawn
    STEP.classes   (2, B, D)        unit vectors of class tokens, or class features
    STEP.counts    int32 (2, B)     chosen patches of each global crop
    STEP.places    int32 (M,)       which patches of their crops these are
    STEP.patches   (M, D)           unit vectors of these

and where features are stored, in place of the last three, STEP.patches (2, B, P, D) of all.
Shape letters: B images of a slot, M chosen patches, P patches of a crop, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from dinoscale.data.augmentation.multi_crop import NUM_GLOBAL

FORMAT = "dinoscale targets 2"  # of 1 the checksums were of no pixels
PROTOTYPES = "prototypes.safetensors"


def stripe_name(shard: int, slot: int) -> str:
    """The file of a slot over the steps of a shard."""
    return stripe_names(shard).replace("*", f"{slot:05d}")


def stripe_names(shard: int) -> str:
    """Pattern of the files of a shard."""
    return f"steps-{shard:05d}-slot-*.safetensors"


@dataclass(frozen=True)
class Stored:
    """What is stored of some images of a step, on the CPU.

    Attributes:
        images: (B,) int64.
        crops: (B,) int64.
        classes: (2, B, D).
        patches: of chosen patches (M, D), in the order of crops; features (2, B, P, D); or None.
        counts: (2, B) int32; None where no patches are chosen.
        places: (M,) int32; None likewise.
    """

    images: Tensor
    crops: Tensor
    classes: Tensor
    patches: Tensor | None = None
    counts: Tensor | None = None
    places: Tensor | None = None

    def named(self, step: int) -> dict[str, Tensor]:
        """The tensors as they are named in a file."""
        found = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {f"{step}.{name}": value for name, value in found if value is not None}

    def rows(self, num_patches: int) -> Tensor | None:
        """The chosen patches, as `Masks.rows` has them; None where none are chosen."""
        if self.counts is None or self.places is None:
            return None
        crops = torch.arange(self.counts.numel()).repeat_interleave(self.counts.flatten().long())
        return crops * num_patches + self.places.long()

    def pinned(self) -> "Stored":
        """The same, what goes to a device in page-locked memory."""
        patches = None if self.patches is None else self.patches.contiguous().pin_memory()
        return replace(self, classes=self.classes.contiguous().pin_memory(), patches=patches)

    def part(self, first: int, stop: int) -> "Stored":
        """That of the images first..stop-1."""
        if (first, stop) == (0, len(self.images)):
            return self
        kept = {
            "images": self.images[first:stop],
            "crops": self.crops[first:stop],
            "classes": self.classes[:, first:stop],
        }
        if self.counts is None or self.places is None or self.patches is None:
            patches = None if self.patches is None else self.patches[:, first:stop]
            return Stored(**kept, patches=patches)
        inside = torch.zeros_like(self.counts, dtype=torch.bool)
        inside[:, first:stop] = True
        chosen = inside.flatten().repeat_interleave(self.counts.flatten().long())
        return Stored(
            **kept,
            patches=self.patches[chosen],
            counts=self.counts[:, first:stop],
            places=self.places[chosen],
        )


def joined(parts: Sequence[Stored]) -> Stored:
    """Those of neighbouring images as one."""
    first = parts[0]
    if len(parts) == 1:
        return first
    whole = Stored(
        torch.cat([part.images for part in parts]),
        torch.cat([part.crops for part in parts]),
        torch.cat([part.classes for part in parts], dim=1),
    )
    if first.patches is None:
        return whole
    if first.counts is None:
        patches = torch.cat([part.patches for part in parts if part.patches is not None], dim=1)
        return replace(whole, patches=patches)
    # By views first, then by images, as the crops of a micro-batch are.
    of_views = [_of_views(part) for part in parts]
    pieces = [views[view] for view in range(NUM_GLOBAL) for views in of_views]
    return replace(
        whole,
        patches=torch.cat([patches for patches, _ in pieces]),
        counts=torch.cat([part.counts for part in parts if part.counts is not None], dim=1),
        places=torch.cat([places for _, places in pieces]),
    )


def _of_views(part: Stored) -> list[tuple[Tensor, Tensor]]:
    """Chosen patches, and their places, of each view."""
    assert part.patches is not None
    assert part.counts is not None
    assert part.places is not None
    sizes = part.counts.sum(1).tolist()
    return list(zip(part.patches.split(sizes), part.places.split(sizes), strict=True))


def stored_of(tensors: Mapping[str, Tensor], step: int, *, patches: bool) -> Stored:
    """What a stripe holds of a step.

    Each tensor is copied: so it lies as aligned in memory as what a network computes, which decides
    how products round.

    Args:
        tensors: of a stripe, by name.
        step: one of its steps.
        patches: whether those of patches are wanted.
    """
    of_patches = {"patches", "counts", "places"}
    wanted = {field.name for field in fields(Stored) if patches or field.name not in of_patches}
    found: Mapping[str, Tensor] = {
        name: tensors[f"{step}.{name}"].clone() for name in wanted if f"{step}.{name}" in tensors
    }
    return Stored(**found)
