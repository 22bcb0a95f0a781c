"""Files of a set that are left out: why, and when they are too many; and junk, which is ignored."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from dinoscale.errors import DataError

log = logging.getLogger(__name__)

# Files and folders that file managers, notebooks and version control leave behind.
_JUNK_FOLDERS = {".git", ".ipynb_checkpoints", ".svn", "@eadir", "__macosx"}
_JUNK_FILES = {".ds_store", ".gitattributes", ".gitignore", ".gitkeep", "desktop.ini", "thumbs.db"}
_APPLE_DOUBLE = "._"  # prefix of the files in which macOS and Samba keep attributes

# Why a file is left out.
SAME_KEY = "same_key"
COMPANION = "companion"
NO_PICTURE = "no_picture"
OTHER_FILES = "other_files"
NO_EXTENSION = "no_extension"
HIDDEN = "hidden"
DEAD_LINK = "dead_link"
LOOP = "loop"
TAR = "tar"
COMPRESSED = "compressed"
NPY = "npy"

_TEXTS = {
    SAME_KEY: "pictures whose key (the name up to its first dot) another picture has",
    COMPANION: "pictures beside the plain one of the same key",
    NO_PICTURE: "samples with a label or a file of an unknown kind, but without a picture",
    OTHER_FILES: "samples of other files, without a picture",
    NO_EXTENSION: "pictures whose name has no extension",
    HIDDEN: "pictures whose name begins with a dot",
    DEAD_LINK: "links that lead nowhere",
    LOOP: "links to a folder above them",
    TAR: ".tar files among images",
    COMPRESSED: "pictures in compressed shards, as many as in the others on average",
    NPY: ".npy files among images",
}
# What to do about lost pictures; the other reasons lose none.
_REMEDIES = {
    SAME_KEY: "give each picture a key of its own, without a dot before its extension",
    NO_PICTURE: "pack each sample with its picture, as KEY.jpg or KEY.png",
    NO_EXTENSION: "pack them with an extension, as KEY.jpg",
    HIDDEN: "pack them under names that do not begin with a dot",
    DEAD_LINK: "copy the files that the links name, or remove the links",
    COMPRESSED: "unpack these shards to plain .tar files",
    TAR: "keep images and shards in separate folders, and name both",
}


@dataclass(frozen=True)
class LeftOut:
    """How many files were left out, by reason.

    Attributes:
        counts: reason -> how often.
        examples: reason -> name of the first.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, why: str, name: str, count: int = 1) -> None:
        """Count some more."""
        self.counts[why] = self.counts.get(why, 0) + count
        self.examples.setdefault(why, name)

    def merge(self, other: LeftOut) -> None:
        """Count all of another set."""
        for why, count in other.counts.items():
            self.add(why, other.examples[why], count)

    @property
    def num_lost(self) -> int:
        """How many of them are, or may be, pictures that should have been used."""
        return sum(count for why, count in self.counts.items() if why in _REMEDIES)

    def warn(self, where: str) -> None:
        """Log what is left out of a set, if anything is."""
        if self.counts:
            log.warning("%s: left out %s", where, _listed(self, self.counts))

    def require_few(self, where: str, *, used: int, max_fraction: float) -> None:
        """Refuse a set that loses too many pictures.

        Args:
            where: the name of the set.
            used: its images.
            max_fraction: fraction of all pictures that may be lost.

        Raises:
            DataError: they are more.
        """
        lost = self.num_lost
        if lost <= max_fraction * (lost + used):
            return
        reasons = {why: n for why, n in self.counts.items() if why in _REMEDIES}
        first = max(reasons, key=lambda why: reasons[why])
        raise DataError(
            f"{where}: {lost} of {lost + used} pictures would be left out, more than"
            f" data.max_bad_fraction={max_fraction:g} allows: {_listed(self, reasons)}. To use"
            f" them, {_REMEDIES[first]}; or raise data.max_bad_fraction."
        )


def _listed(left_out: LeftOut, counts: Mapping[str, int]) -> str:
    return "; ".join(
        f"{count} {_TEXTS[why]}, e.g. {left_out.examples[why]}" for why, count in counts.items()
    )


def is_junk_folder(name: str) -> bool:
    """Whether a folder of this name is junk."""
    return name.lower() in _JUNK_FOLDERS


def is_junk_file(name: str) -> bool:
    """Whether a file of this name is junk in any folder."""
    return name.startswith(_APPLE_DOUBLE) or name.lower() in _JUNK_FILES


def is_junk(path: str) -> bool:
    """Whether the name or a folder of a relative path is junk."""
    *folders, name = path.split("/")
    return is_junk_file(name) or any(map(is_junk_folder, folders))
