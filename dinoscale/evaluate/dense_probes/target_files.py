"""Which file holds the mask or the depth of an image: in a folder of their own, or in its shard."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image

from dinoscale.data.decoding.decode import read_as_stored
from dinoscale.data.shards.tar_source import TarSource
from dinoscale.data.sources.folder import FolderSource
from dinoscale.data.sources.image_files import read_image_file, write_names
from dinoscale.data.sources.listing import Listing, OtherFiles
from dinoscale.data.sources.source import Source
from dinoscale.errors import DataError
from dinoscale.evaluate.beside_images import images_root, require_not_image
from dinoscale.evaluate.frozen_backbone import LoadedBackbone
from dinoscale.runtime.retry import path_exists, with_retries

_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".webp")  # without loss


@dataclass(frozen=True)
class Part:
    """Images, and where their targets lie.

    Attributes:
        images: as `data.train` of a config, or the folder of `names`.
        targets: folder of the targets; None for those in shards.
        names: of the images below their folder; None takes all.
        renames: as of `TargetFiles`.
    """

    images: str
    targets: str | None = None
    names: tuple[str, ...] | None = field(default=None, repr=False)
    renames: tuple[tuple[str, str], ...] = (("", ""),)

    def open(self, loaded: LoadedBackbone) -> Source:
        """Open the images with the channels of a backbone.

        Raises:
            DataError: nothing is there, it cannot be read, or it holds no images.
        """
        if self.names is None:
            return loaded.open(self.images)
        listing = Listing(write_names(self.names, of=self.images), OtherFiles())
        return FolderSource(self.images, listing, loaded.decoder)


@dataclass(frozen=True)
class TargetFiles:
    """Where the targets of a set of images lie; picklable.

    Attributes:
        member: of a shard, beside KEY.jpg: KEY.member.
        folder: of the targets, in the subfolders of their images; None takes those of the shards.
        root: of the images, see `images_root`.
        renames: in the stem of an image, and what stands there in that of its target; the first
            whose file exists counts.
    """

    member: str
    folder: str | None = None
    root: str = ""
    renames: tuple[tuple[str, str], ...] = (("", ""),)

    @classmethod
    def of(
        cls,
        source: Source,
        spec: str,
        folder: str | None,
        *,
        member: str,
        renames: tuple[tuple[str, str], ...] = (("", ""),),
    ) -> TargetFiles:
        """Find where the targets of a set lie.

        Args:
            source: the images.
            spec: what they were opened from.
            folder: of their targets; None if the images lie in shards.
            member: as of the class.
            renames: as of the class.

        Raises:
            DataError: the folder does not exist, or none is named and the images lie in no shards.
        """
        what = member.partition(".")[0]
        if folder is None:
            if not isinstance(source, TarSource):
                raise DataError(
                    f"{spec} holds no {what}s. Name their folder with --train-{what}s and"
                    f" --test-{what}s, or pack images and {what}s into shards as KEY.jpg and"
                    f" KEY.{member}."
                )
            return cls(member)
        place = os.path.abspath(os.path.expanduser(folder))
        if not os.path.isdir(place):
            raise DataError(f"{folder} is not a folder. Name the folder of the {what}s.")
        return cls(member, place, images_root(source, spec), renames)

    def read(self, source: Source, index: int) -> Image.Image | None:
        """The target of an image as it is stored; None if there is none.

        Raises:
            BadSampleError: it cannot be read.
            DataError: it is the image itself.
        """
        if self.folder is None:
            assert isinstance(source, TarSource)
            data = source.sample_file(index, self.member)
            name = f"{source.path(index)}: its {self.member}"
            return None if data is None else read_as_stored(data, name)
        file = self.path(source, index)
        return None if file is None else read_as_stored(read_image_file(file), file)

    def path(self, source: Source, index: int) -> str | None:
        """The file of a target in a folder; None if there is none.

        Where targets have other names than images, both may lie in one folder: a target that is
        listed as an image has none of its own.

        Raises:
            DataError: it is the image itself.
            UnavailableError: the file system failed for a minute.
        """
        image = source.path(index)
        for path in map(str, self._candidates(image)):
            if with_retries(partial(path_exists, path), path):
                if len(self.renames) > 1 and os.path.realpath(path) == os.path.realpath(image):
                    continue
                require_not_image(path, image)
                return path
        return None

    def _candidates(self, image: str) -> Iterator[Path]:
        inside = image.rpartition("::")[2] if "::" in image else os.path.relpath(image, self.root)
        relative, folder = Path(inside), Path(self.folder or "")
        for old, new in self.renames:
            if old in relative.stem:
                stem = relative.stem.replace(old, new, 1) if old else relative.stem
                yield from (folder / relative.parent / f"{stem}{suffix}" for suffix in _SUFFIXES)
