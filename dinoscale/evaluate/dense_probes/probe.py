"""A frozen backbone, opened once for a task on single pixels, and the features to compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from torch import nn

from dinoscale.errors import ConfigError
from dinoscale.evaluate.any_size import find_patch_size
from dinoscale.evaluate.classification.resumable_training import check_target
from dinoscale.evaluate.dense_probes.kept_head import remove_states, save_head, state_beside
from dinoscale.evaluate.dense_probes.linear_head import HeadTraining, LinearHead
from dinoscale.evaluate.dense_probes.pairs import Reading
from dinoscale.evaluate.dense_probes.patch_maps import (
    BlockMaps,
    Maps,
    PixelMaps,
    Precision,
    Spread,
    choose_blocks,
)
from dinoscale.evaluate.frozen_backbone import ExtractionOptions, LoadedBackbone, load_frozen

FeaturesName = Literal["trained", "untrained", "colors"]


class Features(NamedTuple):
    """Features to measure: their name, what makes maps of them, and of which backbone."""

    name: FeaturesName
    maps: Maps
    backbone: nn.Module | None


@dataclass(frozen=True)
class Probe:
    """A backbone, and how it is measured.

    Attributes:
        loaded: the backbone.
        blocks: whose patch tokens are joined.
        precision: of the forward of the backbone.
        reading: how images are read.
        seed: of all random numbers.
        out: file of the trained head, if it is kept.
        network: teacher or student.
    """

    loaded: LoadedBackbone
    blocks: tuple[int, ...]
    precision: Precision
    reading: Reading
    seed: int
    out: Path | None
    network: str

    @classmethod
    def open(
        cls,
        weights_path: str | Path,
        options: ExtractionOptions,
        *,
        layers: int,
        spread: Spread,
        precision: Precision | None,
        seed: int,
        out: str | Path | None,
    ) -> Probe:
        """Load a backbone.

        Args:
            weights_path: any weights of a ViT that `load_backbone` reads.
            options: which network and device, images of one forward, processes that decode.
            layers: number of blocks.
            spread: which blocks these are, as of `choose_blocks`.
            precision: None is bf16 on a GPU, fp32 on a CPU.
            seed: >= 0.
            out: file to write; None writes nothing.

        Raises:
            CheckpointError: the weights cannot be used.
            ConfigError: a setting is out of range, the backbone is no ViT, or there is no such
                device.
            OutputError: `out` is a file that this program did not write.
        """
        if seed < 0:
            raise ConfigError(f"seed: need 0 or more, got {seed}")
        target = check_target(out, weights_path)
        loaded = load_frozen(weights_path, options)
        blocks = choose_blocks(loaded.backbone, layers, spread)
        reading = Reading(
            *(loaded.card.mean, loaded.card.std, loaded.device),
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            progress=options.progress,
        )
        chosen = precision or ("bf16" if loaded.device.type == "cuda" else "fp32")
        return cls(loaded, blocks, chosen, reading, seed, target, options.network)

    def features(self, name: FeaturesName) -> Features:
        """Those of the weights, of fresh weights, or the pixels of each patch."""
        if name == "colors":
            patch = find_patch_size(self.loaded.backbone)
            channels = self.loaded.card.backbone.in_chans
            return Features(name, PixelMaps(patch=patch, channels=channels), None)
        loaded = self.loaded if name == "trained" else self.loaded.untrained()
        backbone = loaded.backbone
        return Features(name, BlockMaps(backbone, self.blocks, self.precision), backbone)

    def protocol(self) -> dict[str, object]:
        """All of it that changes a number, ready for JSON."""
        return {
            "network": self.network,
            "features": "patch tokens of these blocks through the final norm, joined",
            "blocks": list(self.blocks),
            "precision": self.precision,
            "seed": self.seed,
            "mean": list(self.loaded.card.mean),
            "std": list(self.loaded.card.std),
        }

    def trained_head(
        self,
        features: Features,
        training: HeadTraining,
        *,
        outputs: int,
        protocol: Mapping[str, object],
        module: str,
        card: Mapping[str, object],
    ) -> LinearHead:
        """Train a head, resuming an earlier start; that on the weights' own features is kept.

        Args:
            features: what it learns from.
            training: how.
            outputs: of the head.
            protocol: all settings that change a number.
            module: the one whose code decides them.
            card: what is written beside the weights, with the protocol.

        Raises:
            CheckpointError: the saved state of the training is damaged.
            ConfigError: it belongs to another training, or a file cannot be written.
            NonFiniteError: the training diverged.
        """
        head = LinearHead(features.maps.width, outputs, seed=self.seed).to(self.reading.device)
        saved = state_beside(
            *(self.out, features.name),
            backbone=features.backbone,
            train=training.pairs,
            protocol=protocol,
            module=module,
        )
        training.train(head, features.maps, saved)
        if self.out is not None and features.name == "trained":
            about = {"weights": self.loaded.path, "train": training.pairs.about}
            save_head(head, self.out, {**card, **about, "protocol": protocol})
        return head

    def forget_states(self) -> None:
        """Delete the states of all trainings: they are reported."""
        if self.out is not None:
            remove_states(self.out)
