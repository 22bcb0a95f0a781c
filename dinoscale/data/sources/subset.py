"""A fixed choice of images of a source; a smaller choice is a subset of a larger one."""

from collections.abc import Callable

import numpy as np

from dinoscale.data.decoding.decode import Picture
from dinoscale.data.order.permutation import Permutation
from dinoscale.data.seeding import Stream, generator
from dinoscale.data.sources.source import StoredSource

_SEED = 0  # not the run's: all runs of a sweep over seeds train on the same images


class SubsetSource:
    """The first images of a permutation of a source, without their classes.

    The choice depends only on the number of images of the source; it takes no list in memory.

    Attributes:
        whole: the source.

    Args:
        whole: the source.
        images: how many to take, 1 <= images <= len(whole).
    """

    labels = None
    class_names = None

    def __init__(self, whole: StoredSource, *, images: int):
        if not 1 <= images <= len(whole):
            raise ValueError(f"need 1 <= images <= {len(whole)}, got {images}")
        self.whole, self._images = whole, images
        self._order = Permutation(len(whole), generator(_SEED, Stream.SUBSET))

    def __len__(self) -> int:
        return self._images

    @property
    def chosen_from(self) -> int:
        """Images of the whole source."""
        return len(self.whole)

    def path(self, index: int) -> str:
        """Where the image is, for messages."""
        return self.whole.path(self._find(index))

    def identity(self, heartbeat: Callable[[], None] = lambda: None, /) -> str:
        """The identity of the source, and the number of images taken."""
        return f"{self.whole.identity(heartbeat)} {self._images}"

    def picture(self, index: int) -> Picture:
        """The picture; BadSampleError as its own source raises it."""
        return self.whole.picture(self._find(index))

    def _find(self, index: int) -> int:
        if not 0 <= index < self._images:
            raise IndexError(f"image {index} of {self._images}")
        return int(self._order(np.array([index]))[0])
