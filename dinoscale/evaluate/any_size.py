"""Whole images of any size and shape as inputs of a ViT: resized, and cut to whole patches.

Shape letters: C channels, H, W pixels, R, C rows and columns of patches, p patch size.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from dinoscale.convert.card import BackboneCard
from dinoscale.data.augmentation.multi_crop import to_image, to_pixels
from dinoscale.data.augmentation.normalize import normalize_images
from dinoscale.data.decoding.decode import Decoder
from dinoscale.data.sources.folder import FolderSource
from dinoscale.data.sources.image_files import write_names
from dinoscale.data.sources.listing import COMPRESSED_TAR, Listing, OtherFiles
from dinoscale.data.sources.source import Source, StoredSource, open_source
from dinoscale.data.transfer import to_device
from dinoscale.errors import ConfigError, DataError, UnavailableError
from dinoscale.evaluate.features import eval_mode, require_finite
from dinoscale.evaluate.frozen_backbone import (
    LoadedBackbone,
    LoadOptions,
    load_frozen,
    load_on_ranks,
)
from dinoscale.evaluate.progress import bar_options
from dinoscale.runtime.outputs import atomic_write

log = logging.getLogger(__name__)

SIZE = 480  # pixels, as the reference's attention figures
MAX_PATCHES = 2**14  # of one image: 2048 x 2048 pixels in patches of 16

_NAME_LENGTH = 80  # characters; some file systems allow little more


@dataclass(frozen=True)
class Fit:
    """How images become whole patches.

    Attributes:
        patch: p in pixels.
        size: short side after the bicubic resize, in pixels; long sides keep the aspect ratio.
        square: squeeze to size x size instead, as the reference does for its figures.
    """

    patch: int
    size: int = SIZE
    square: bool = False

    def __post_init__(self) -> None:
        if self.size < self.patch:
            raise ConfigError(
                f"size: need at least one patch of {self.patch} pixels, got {self.size}"
            )

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Number of patches of an image: (R, C).

        Raises:
            DataError: they are too many for one forward.
        """
        columns, rows = (side // self.patch for side in self._resized(width, height))
        if rows * columns > MAX_PATCHES:
            raise DataError(
                f"{width} x {height} pixels become {columns} x {rows} patches, more than "
                f"{MAX_PATCHES}. Crop the image, or choose a smaller size, or squares."
            )
        return rows, columns

    def area(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in pixels of what `cut` leaves of an image; errors as of `grid`."""
        rows, columns = self.grid(width, height)
        return columns * self.patch, rows * self.patch

    def cut(self, image: Image.Image) -> Image.Image:
        """Resize, then cut off partial patches at the right and lower edge, as the reference."""
        resized = image.resize(self._resized(*image.size), Image.Resampling.BICUBIC)
        return resized.crop((0, 0, *self.area(*image.size)))

    def squeeze(self, image: Image.Image) -> Image.Image:
        """Resize to whole patches, so that the grid covers all of the image."""
        return image.resize(self.area(*image.size), Image.Resampling.BICUBIC)

    def protocol(self) -> dict[str, object]:
        """All that changes a number, ready for JSON."""
        return {**asdict(self), "interpolation": "bicubic"}

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after the resize, in pixels; long sides round down, as torchvision's."""
        if self.square:
            return self.size, self.size
        short = min(width, height)
        return width * self.size // short, height * self.size // short


def find_patch_size(backbone: nn.Module) -> int:
    """Return p of a ViT.

    Raises:
        ConfigError: it is no ViT.
    """
    if not callable(getattr(backbone, "last_attention", None)):
        kind = type(backbone).__name__
        raise ConfigError(f"attention and patch features need a ViT, this is a {kind}")
    return int(backbone.patch_size)  # type: ignore[arg-type]  # an int of every ViT


def image_mode(*, channels: int) -> str:
    """Return the Pillow mode of the images of a backbone.

    Raises:
        ConfigError: Pillow has no mode for that number of channels.
    """
    if channels not in (1, 3):
        raise ConfigError(f"this task works on pictures of 1 or 3 channels, not {channels}")
    return "RGB" if channels == 3 else "L"


def open_images(
    spec: str, card: BackboneCard, heartbeat: Callable[[], None] = lambda: None
) -> StoredSource:
    """Open a set of images with the channels of a backbone; one image file is a set too.

    Args:
        spec: an image file, or a set as `data.train` of a config.
        card: of the backbone.
        heartbeat: as of `open_source`.

    Raises:
        ConfigError: the backbone's channels cannot be drawn.
        DataError: nothing is there, or it holds no images.
    """
    image_mode(channels=card.backbone.in_chans)
    decoder = Decoder(card.backbone.in_chans, card.max_pixel_value)
    path = os.path.expanduser(spec)
    if os.path.isfile(path) and not path.lower().endswith((".txt", ".tar", *COMPRESSED_TAR)):
        folder, name = os.path.split(os.path.abspath(path))
        return FolderSource(folder, Listing(write_names([name], of=spec), OtherFiles()), decoder)
    return open_source(spec, decoder, heartbeat)


def read_image(source: Source, index: int) -> Image.Image:
    """Read an image of a set.

    Raises:
        BadSampleError: it cannot be decoded.
    """
    return to_image(source.picture(index).pixels())


@dataclass(frozen=True)
class FittedImage:
    """An image as a backbone sees it.

    Attributes:
        number: of the image in its set.
        path: where it lies, for messages.
        size: its original height and width in pixels.
        image: resized and cut to whole patches.
    """

    number: int
    path: str
    size: tuple[int, int]
    image: Image.Image

    def save(self, file: Path, arrays: dict[str, NDArray[Any]], *, patch: int) -> None:
        """Write arrays into an NPZ file, with `name`, `patch`, and two sizes of the image.

        These are the (height, width) in pixels of the image, `size`, and of the input, `seen`.
        """
        about = {
            "name": np.array(self.path.encode("utf-8", "replace").decode()),
            "patch": np.array(patch),
            "size": np.array(self.size),
            "seen": np.array([self.image.height, self.image.width]),
        }
        with atomic_write(file) as beside:
            np.savez(beside, allow_pickle=False, **arrays, **about)


class FittedImages:
    """The images of a set one by one; those that cannot be used are named and left out.

    Attributes:
        fit: how they become whole patches.
        left_out: `path: reason` of each so far.
    """

    def __init__(self, source: Source, fit: Fit, *, limit: int | None, progress: bool) -> None:
        """Take the first `limit` images, or all; `progress` draws a bar (`bar_options`)."""
        if limit is not None and limit < 1:
            raise ConfigError(f"limit: need at least one image, got {limit}")
        self.fit = fit
        self.left_out: list[str] = []
        self._source, self._progress = source, progress
        self._number = min(len(source), limit or len(source))

    def __iter__(self) -> Iterator[FittedImage]:
        """Yield the usable images; there may be none.

        Raises:
            UnavailableError: a file cannot be read, which says nothing about its content.
        """
        bar = tqdm(range(self._number), unit="img", **bar_options(shown=self._progress))
        for index in bar:
            path = self._source.path(index)
            try:
                fitted = self.read(index)
            except UnavailableError:  # it says nothing about the image
                raise
            except DataError as error:
                self.left_out.append(str(error) if path in str(error) else f"{path}: {error}")
                log.warning("left out %s", self.left_out[-1])
                continue
            yield fitted

    def read(self, index: int) -> FittedImage:
        """Read one image.

        Raises:
            DataError: it cannot be decoded, or has too many patches.
        """
        image = read_image(self._source, index)
        size = (image.height, image.width)
        return FittedImage(index, self._source.path(index), size, self.fit.cut(image))


@dataclass(frozen=True)
class WholeImages(LoadedBackbone):
    """A frozen ViT, and how it sees whole images of any size.

    Attributes:
        fit: how images become its inputs.
    """

    fit: Fit

    @classmethod
    def of(cls, loaded: LoadedBackbone, *, size: int, square: bool) -> WholeImages:
        """Take a loaded ViT; `size` and `square` as of `Fit`.

        Raises:
            ConfigError: the size is below a patch, or it is no ViT.
        """
        fit = Fit(find_patch_size(loaded.backbone), size, square)
        return cls(**vars(loaded), fit=fit)

    def open(self, spec: str, heartbeat: Callable[[], None] = lambda: None) -> StoredSource:
        """Open a set of images, or one image file; see `open_images`."""
        return open_images(spec, self.card, heartbeat)

    def fitted(self, spec: str, *, limit: int | None) -> FittedImages:
        """The first `limit` images of a set one by one, or all; errors as of `open_images`."""
        return self.fit_all(self.open(spec), limit=limit)

    def fit_all(self, source: Source, *, limit: int | None) -> FittedImages:
        """The first `limit` images of an open set one by one, or all."""
        return FittedImages(source, self.fit, limit=limit, progress=self.options.progress)

    def input(self, image: Image.Image) -> Tensor:
        """Normalise an image of whole patches: (1, C, H, W) on the device, as the weights are."""
        return to_input(image, self.backbone, mean=self.card.mean, std=self.card.std)

    def patch_maps(self, image: Image.Image, blocks: int = 1) -> list[Tensor]:
        """Patch features of an image of whole patches, through the final norm.

        Args:
            image: of `Fit.cut` or `Fit.squeeze`.
            blocks: number of last blocks.

        Returns:
            Of each of these, the last one last, (R, C, D) float32 on the device.

        Raises:
            NonFiniteError: a feature is not a finite number.
            ValueError: there are not so many blocks.
        """
        with eval_mode(self.backbone), torch.no_grad():
            maps: list[Tensor] = self.backbone.patch_maps(self.input(image), blocks)  # type: ignore[operator]  # of a ViT
        return [require_finite(of_block[0].float()) for of_block in maps]


def load_whole_images(
    weights_path: str | Path, options: LoadOptions, *, size: int = SIZE, square: bool = False
) -> WholeImages:
    """Load the ViT of a weights file for whole images; `size` and `square` as of `Fit`.

    Raises:
        CheckpointError: the weights cannot be used.
        ConfigError: there is no such device, the size is below a patch, or it is no ViT.
    """
    return WholeImages.of(load_frozen(weights_path, options), size=size, square=square)


def load_whole_images_on_ranks(
    weights_path: str | Path, options: LoadOptions, *, size: int = SIZE, square: bool = False
) -> WholeImages:
    """`load_whole_images` where ranks share the work: all call it, and fail together.

    Raises:
        CheckpointError: as of `load_whole_images`, or ranks loaded different weights.
        ConfigError: as of `load_whole_images`.
    """
    return WholeImages.of(load_on_ranks(weights_path, options), size=size, square=square)


class NamedFolders:
    """Makes a folder below `out` for each image, named as the image."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._taken: set[str] = set()

    def make(self, path: str) -> Path:
        """Make the folder of an image, `path` as its source gives it."""
        folder = self._out / self.name(path)
        folder.mkdir(exist_ok=True)
        return folder

    def name(self, path: str) -> str:
        """The name of a folder to make; equal ones get a number."""
        base = path.rpartition("::")[2].rpartition("/")[2]  # of a member, or of a file
        stem = re.sub(r"[^\w.+-]+", "_", base.rpartition(".")[0] or base).strip(".")
        stem = stem[:_NAME_LENGTH] or "image"
        name, number = stem, 1
        while name.casefold() in self._taken:
            number += 1
            name = f"{stem}-{number}"
        self._taken.add(name.casefold())
        return name


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture, in the format of the file extension.

    Raises:
        OutputError: a file that this program did not write is there.
        OSError: it cannot be written.
    """
    with atomic_write(path) as beside:
        picture.save(beside)


@contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """Make a folder to write into.

    Raises:
        DataError: it cannot be made, or a write within the block fails.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"cannot write to {error.filename or out}: {reason}") from error


def to_input(
    image: Image.Image, like: nn.Module, *, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Normalise an image for a backbone: (1, C, H, W) on its device, of its dtype."""
    weight = next(like.parameters())
    pixels = torch.from_numpy(to_pixels(image).copy()).permute(2, 0, 1)[None]
    return normalize_images(to_device(pixels, weight.device), mean=mean, std=std).to(weight.dtype)
