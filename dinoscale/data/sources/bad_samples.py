"""The list of images that cannot be read, and the decision when there are too many of them."""

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from dinoscale.errors import DataError

log = logging.getLogger(__name__)

_MIN_FOR_RATE = 10  # unreadable images before a running count is compared with the limit
_STANDARD_ERRORS = 3  # above the limit, for a running count to be significant
_EXAMPLES_SHOWN = 3


@dataclass(frozen=True)
class BadSample:
    """One unreadable image and its replacement.

    Attributes:
        path: path of the unreadable image.
        error: one line.
        sample_id: its number among the images trained on.
        replaced_by: number of the image that was used instead.
        repeat: how often the image was drawn before: the epoch, if each draws it once.
        unavailable: the file system failed, which says nothing about the image.
    """

    path: str
    error: str
    sample_id: int
    replaced_by: int
    repeat: int
    unavailable: bool = False


class BadSampleLog:
    """`bad_samples.jsonl`: one line for each unreadable file, over all resumes of a run.

    Each process counts anew: files repaired between two starts do not count in the second.

    Args:
        path: the file; made when the first sample is added, continued if it exists.
        writes: whether this process writes the file; others only count.
    """

    def __init__(self, path: Path, *, writes: bool = True):
        self._path, self._writes = path, writes
        self._listed = _listed_paths(path) if writes else set()
        self._met: dict[str, str] = {}  # path -> error, since this log was opened
        self._num_occurrences = 0

    @property
    def num_occurrences(self) -> int:
        """How often an unreadable image was met since this log was opened."""
        return self._num_occurrences

    @property
    def num_files(self) -> int:
        """How many different files those were."""
        return len(self._met)

    def add(self, samples: Iterable[BadSample]) -> None:
        """Count the samples and append those files that are not listed yet."""
        lines = []
        for sample in samples:
            self._num_occurrences += 1
            self._met.setdefault(sample.path, sample.error)
            if self._writes and sample.path not in self._listed:
                self._listed.add(sample.path)
                lines.append(json.dumps(asdict(sample)) + "\n")
                log.warning("unreadable image %s: %s", sample.path, sample.error)
        if lines:
            try:
                _append(self._path, "".join(lines))
            except OSError as error:  # a full disk costs the lines, not the run
                log.warning("cannot write %s: %s", self._path, error)

    def check(self, *, max_fraction: float, seen: int, num_images: int) -> None:
        """Stop the run when too many images are unreadable.

        There are two tests. The exact one compares the different unreadable files with all images
        of the source. The early one, for large sources, compares occurrences with images drawn, but
        only from ten on and three standard errors above the limit, so that one early bad file stops
        nothing.

        Args:
            max_fraction: allowed fraction of unreadable images; 0 allows none.
            seen: images drawn over all ranks since this log was opened.
            num_images: images of the source.

        Raises:
            DataError: there are too many.
        """
        expected = max_fraction * seen
        bound = max(expected + _STANDARD_ERRORS * math.sqrt(expected), _MIN_FOR_RATE - 1)
        too_many_files = self.num_files > max_fraction * num_images and (
            self.num_files >= min(_MIN_FOR_RATE, num_images) or seen >= num_images
        )
        if max_fraction == 0:
            too_many_files = self.num_files > 0
        if too_many_files or self._num_occurrences > bound:
            raise DataError(self._message(max_fraction=max_fraction, seen=seen))

    def _message(self, *, max_fraction: float, seen: int) -> str:
        shown = list(self._met.items())[:_EXAMPLES_SHOWN]
        examples = "".join(f"\n  {path}: {error}" for path, error in shown)
        more = f"\n  and {self.num_files - len(shown)} more" if self.num_files > len(shown) else ""
        return (
            f"too many unreadable images: {self._num_occurrences} of {seen} drawn "
            f"({self.num_files} different files), more than data.max_bad_fraction="
            f"{max_fraction:g} allows:{examples}{more}\n"
            f"All are listed in {self._path}. Repair or remove them, or raise "
            "data.max_bad_fraction."
        )


def _listed_paths(path: Path) -> set[str]:
    """Files already listed; a line cut off by a crash is skipped."""
    if not path.exists():
        return set()
    return {_listed_path(line) for line in path.read_bytes().splitlines()}


def _listed_path(line: bytes) -> str:
    """Path in a line; empty, which is not a path, for a damaged line."""
    try:
        return str(json.loads(line)["path"])
    except Exception:  # a damaged line can fail in any way
        return ""


def _append(path: Path, text: str) -> None:
    """Append whole lines, also after a last line that a crash cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        end = file.seek(0, 2)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode("utf-8"))
