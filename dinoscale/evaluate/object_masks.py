"""Masks of the objects in images: found beside them, read, and taken apart into single objects.

Shape letters: M objects, H, W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinoscale.data.decode import read_as_stored
from dinoscale.data.files import read_image_file
from dinoscale.data.shards import TarSource
from dinoscale.data.sources import Source
from dinoscale.errors import DataError

MEMBER = "mask.png"  # beside KEY.jpg in a shard
VOID = 255  # of indexed masks: the unclear rim of objects, neither object nor background

_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif", ".webp", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Objects:
    """What the mask of one image says.

    Attributes:
        masks: (M, H, W) bool, none empty.
        counted: (H, W) bool, False on void.
    """

    masks: Tensor
    counted: Tensor


MaskOf = Callable[
    [int], Image.Image | None
]  # of the image at an index, as stored; None: it has none


def find_masks(source: Source, spec: str, folder: str | None) -> MaskOf:
    """Say how to get at the masks of a set of images.

    Args:
        source: the images.
        spec: what they were opened from.
        folder: of masks with the names of the images up to the extension, in the same subfolders;
            None takes what the set itself holds: `KEY.mask.png` of shards, or what was drawn.

    Raises:
        DataError: the folder is not there, or the set holds no masks of its own.
    """
    if folder is not None:
        if not os.path.isdir(os.path.expanduser(folder)):
            raise DataError(f"{folder} is not a folder. Name the folder of the masks.")
        return _of_folder(source, spec, Path(folder).expanduser())
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
    root = os.path.abspath(os.path.expanduser(spec))
    if not os.path.isdir(root):  # one image, or a list of images
        root = os.path.dirname(root)

    def mask(index: int) -> Image.Image | None:
        path = source.path(index)
        if isinstance(source, TarSource):
            relative = path.rpartition("::")[2]
        else:
            relative = os.path.relpath(path, root)
        for suffix in _SUFFIXES:
            file = folder / Path(relative).with_suffix(suffix)
            if file.exists():
                return read_as_stored(read_image_file(str(file)), str(file))
        return None

    return mask


def _of_shards(source: TarSource) -> MaskOf:
    def mask(index: int) -> Image.Image | None:
        data = source.beside(index, MEMBER)
        return None if data is None else read_as_stored(data, f"{source.path(index)}: its {MEMBER}")

    return mask


def split_objects(mask: Image.Image, *, indexed: bool) -> Objects:
    """Take a mask apart.

    A mask with a palette, as VOC's and DAVIS', numbers its objects: 0 is background, 255 void. Any
    other is one object: where it is brighter than 127.

    Args:
        mask: as stored.
        indexed: gray masks hold numbers of objects too.
    """
    if mask.mode == "P" or (indexed and mask.mode == "L"):
        numbers = np.asarray(mask)  # (H, W)
        names = [number for number in np.unique(numbers).tolist() if number not in (0, VOID)]
        masks = numbers == np.array(names, dtype=np.uint8)[:, None, None]  # (M, H, W)
        return Objects(torch.from_numpy(masks), torch.from_numpy(numbers != VOID))
    inside = torch.from_numpy(np.asarray(mask.convert("L")) > 127)
    masks_ = inside[None] if inside.any() else inside.new_zeros(0, *inside.shape)
    return Objects(masks_, torch.ones_like(inside))
