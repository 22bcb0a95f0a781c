"""Random generators as functions of (run seed, purpose, key), never of process history."""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What the numbers are for; two purposes never share a stream."""

    ORDER = 1
    CROPS = 2
    REPLACEMENT = 3
    MIXTURE = 4
    LANES = 5
    SUBSET = 6
    MASKS = 7
    SIZES = 8
    CURATION = 9
    DROPOUT = 10


def generator(seed: int, stream: Stream, *key: int) -> np.random.Generator:
    """The generator of one purpose and key, e.g. (epoch, sample, crop).

    Args:
        seed: seed of the run, >= 0.
        stream: the purpose.
        key: integers >= 0 below 2**32, always as many of them for one purpose.
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stream, *key])))
