"""Masks of the objects in images: found, read, and split into single objects.

Shape letters: M objects, H, W pixels.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinoscale.data.decoding.decode import read_as_stored
from dinoscale.data.shards.tar_source import TarSource
from dinoscale.data.sources.image_files import read_image_file
from dinoscale.data.sources.source import Source
from dinoscale.errors import DataError, UnavailableError
from dinoscale.evaluate.any_size import Fit
from dinoscale.evaluate.beside_images import images_root, require_not_image
from dinoscale.runtime.retry import path_exists, with_retries

log = logging.getLogger(__name__)

MEMBER = "mask.png"  # beside KEY.jpg in a shard
VOID = 255  # of indexed masks: the ambiguous border of objects, ignored in scores

_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif", ".webp", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Objects:
    """The objects of one image, from its mask.

    Attributes:
        masks: (M, H, W) bool, none empty.
        counted: (H, W) bool, False on void.
    """

    masks: Tensor
    counted: Tensor


# The mask of the image at an index, as stored; None if it has none.
MaskOf = Callable[[int], Image.Image | None]


def find_masks(source: Source, spec: str, folder: str | None) -> MaskOf:
    """Return a function that reads the mask of each image of a set.

    Args:
        source: the images.
        spec: what they were opened from.
        folder: of masks with the names of the images up to the extension, in the same subfolders;
            None takes the set's own: `KEY.mask.png` of shards, or those of synthetic sets.

    Raises:
        DataError: the folder does not exist, or the set holds no masks.
    """
    if folder is not None:
        if not os.path.isdir(os.path.expanduser(folder)):
            raise DataError(f"{folder} is not a folder. Name the folder of the masks.")
        return _of_folder(source, spec, Path(os.path.expanduser(folder)))
    if isinstance(source, TarSource):
        return _of_shards(source)
    drawn = getattr(source, "mask", None)
    if drawn is None:
        raise DataError(
            f"{spec} holds no masks. Name their folder with --masks, or pack images and masks into "
            f"shards as KEY.jpg and KEY.{MEMBER}."
        )
    return drawn  # type: ignore[no-any-return]  # of synthetic sets


def _of_folder(source: Source, spec: str, folder: Path) -> MaskOf:
    name = relative_names(source, spec)

    def mask(index: int) -> Image.Image | None:
        for suffix in _SUFFIXES:
            file = str(folder / Path(name(index)).with_suffix(suffix))
            if with_retries(partial(path_exists, file), file):
                require_not_image(file, source.path(index))
                return read_as_stored(read_image_file(file), file)
        return None

    return mask


def relative_names(source: Source, spec: str) -> Callable[[int], str]:
    """Return a function that gives the path of an image in its folder or shard.

    Args:
        source: the images.
        spec: what they were opened from.
    """
    root = images_root(source, spec)

    def name(index: int) -> str:
        path = source.path(index)
        if isinstance(source, TarSource):
            return path.rpartition("::")[2]
        return os.path.relpath(path, root)

    return name


def _of_shards(source: TarSource) -> MaskOf:
    def mask(index: int) -> Image.Image | None:
        data = source.sample_file(index, MEMBER)
        return None if data is None else read_as_stored(data, f"{source.path(index)}: its {MEMBER}")

    return mask


def split_objects(mask: Image.Image, *, indexed: bool) -> Objects:
    """Split a mask into its objects.

    A mask with a palette, as in VOC and DAVIS, or with more than 8 bits holds object numbers: 0 is
    background, 255 void. A gray one of 8 bits, or in RGB with gray colors only, is one object,
    where it is brighter than 127.

    Args:
        mask: as stored.
        indexed: gray masks of 8 bits hold object numbers too.

    Raises:
        DataError: it has colors, a transparency, or fractions.
    """
    if mask.mode == "P" or mask.mode.startswith("I") or (indexed and mask.mode == "L"):
        numbers = np.asarray(mask)  # (H, W)
        names = [number for number in np.unique(numbers).tolist() if number not in (0, VOID)]
        masks = numbers == np.array(names, dtype=numbers.dtype)[:, None, None]  # (M, H, W)
        return Objects(torch.from_numpy(masks), torch.from_numpy(numbers != VOID))
    inside = torch.from_numpy(np.asarray(_gray(mask)) > 127)
    masks_ = inside[None] if inside.any() else inside.new_zeros(0, *inside.shape)
    return Objects(masks_, torch.ones_like(inside))


def _gray(mask: Image.Image) -> Image.Image:
    """Convert a mask without object numbers to 8 bits."""
    if mask.mode == "RGB":
        red, green, blue = (channel.tobytes() for channel in mask.split())
        if red == green == blue:
            return mask.getchannel(0)
    elif mask.mode in ("1", "L"):
        return mask.convert("L")
    raise DataError(
        f"a mask of mode {mask.mode} does not tell objects from background. Save it gray, with a"
        " palette, or with object numbers in 8 or 16 bits."
    )


@dataclass
class LeftOut:
    """Images that are not scored, by reason, as `path: reason` each."""

    unreadable: list[str] = field(default_factory=list)
    without_mask: list[str] = field(default_factory=list)
    empty_mask: list[str] = field(default_factory=list)


def usable_images(
    source: Source, mask_of: MaskOf, fit: Fit, *, indexed: bool
) -> tuple[list[int], LeftOut]:
    """Read all masks before a network starts, to find the images that can be scored.

    Args:
        source: the images.
        mask_of: their masks.
        fit: how images become inputs of the network.
        indexed: as of `split_objects`.

    Returns:
        Indices of the images that can be read and have an object; and the others, by reason.

    Raises:
        DataError: a mask has another size than its image or no objects can be told from it, or no
            image can be scored.
        UnavailableError: a file cannot be read, which says nothing about its content.
    """
    indices, left_out = [], LeftOut()
    for index in range(len(source)):
        path = source.path(index)
        try:
            picture = source.picture(index)
            fit.grid(picture.width, picture.height)
            mask = mask_of(index)
        except UnavailableError:  # it says nothing about the mask
            raise
        except DataError as error:
            reason = str(error) if path in str(error) else f"{path}: {error}"
            left_out.unreadable.append(reason)
            log.warning("left out %s", reason)
            continue
        if mask is None:
            left_out.without_mask.append(path)
            continue
        if mask.size != (picture.width, picture.height):
            raise DataError(
                f"{path}: the image has {picture.width} x {picture.height} pixels, its mask "
                f"{mask.width} x {mask.height}. Both must have the same size, the image upright."
            )
        try:
            objects = split_objects(mask, indexed=indexed)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        if len(objects.masks):
            indices.append(index)
        else:
            left_out.empty_mask.append(path)
    report_left_out(
        {
            "cannot be read": left_out.unreadable,
            "have no mask": left_out.without_mask,
            "have a mask without an object": left_out.empty_mask,
        },
        num_usable=len(indices),
        num_images=len(source),
        hint="Masks are named as their images; objects are brighter than 127, or numbered"
        " (--indexed).",
    )
    return indices, left_out


def report_left_out(
    kinds: Mapping[str, Sequence[str]], *, num_usable: int, num_images: int, hint: str
) -> None:
    """Log once how many images are not scored.

    Args:
        kinds: what is wrong with images, in words, and these images.
        num_usable: the others.
        num_images: all.
        hint: how images and what they are scored by belong together.

    Raises:
        DataError: there are no others.
    """
    said = [f"{len(paths)} {what}, e.g. {paths[0]}" for what, paths in kinds.items() if paths]
    if not num_usable:
        raise DataError(f"none of {num_images} images can be scored: {'; '.join(said)}. {hint}")
    if said:
        log.warning("%d of %d images are scored: %s", num_usable, num_images, "; ".join(said))
