"""Several sources as one: the images of the first, then those of the second, and so on."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from dinoscale.data.decode import RGB, Decoder, Picture
from dinoscale.data.sources import Source, open_source


class MixedSource:
    """The images of all parts under consecutive numbers, without their classes.

    How often each part is drawn is for the sampler to say.

    Args:
        parts: two sources or more.
    """

    labels = None
    class_names = None

    def __init__(self, parts: Sequence[Source]):
        self._parts = tuple(parts)
        self._starts = [0, *accumulate(len(part) for part in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def path(self, index: int) -> str:
        """Where the image is, for messages."""
        part, within = self._find(index)
        return part.path(within)

    def picture(self, index: int) -> Picture:
        """The picture; BadSampleError as its own source raises it."""
        part, within = self._find(index)
        return part.picture(within)

    @property
    def sizes(self) -> list[int]:
        """Images of each part."""
        return [len(part) for part in self._parts]

    def part_of(self, index: int) -> range:
        """The numbers of all images that come from the same part as one image."""
        number = bisect_right(self._starts, index)
        return range(self._starts[number - 1], self._starts[number])

    def _find(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        number = bisect_right(self._starts, index) - 1
        return self._parts[number], index - self._starts[number]


def open_sources(specs: Sequence[str], decoder: Decoder = RGB) -> Source:
    """Open the sources of a training set as one.

    Args:
        specs: one or more, each as `open_source` takes it.
        decoder: what the pixels of their files become.

    Raises:
        DataError: one of them cannot be opened.
    """
    parts = [open_source(spec, decoder) for spec in specs]
    return parts[0] if len(parts) == 1 else MixedSource(parts)


def source_sizes(source: Source) -> list[int]:
    """Images of each source that a training set is mixed from; one number if it is not mixed."""
    return source.sizes if isinstance(source, MixedSource) else [len(source)]


def stand_ins(source: Source, index: int) -> range:
    """The numbers of the images that may replace an unreadable one: of the same source."""
    return source.part_of(index) if isinstance(source, MixedSource) else range(len(source))
