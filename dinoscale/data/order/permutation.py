"""A pseudo-random permutation computed position by position, without an array of its size.

A Feistel network on pairs (l, r) in Z_a x Z_b with a = ceil(sqrt(N)) and a b >= N: the rounds add a
keyed hash of r to l and of l to r in turn. Each addition can be undone, so the network permutes
a b numbers. The few results >= N go through it again until they are below (cycle walking), which
is a permutation of N numbers.
Source: Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains (the generalized Feistel
cipher); the hash is the finalizer of SplitMix64 (Steele et al. 2014).
"""

import math

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 16  # 4 scatter a large domain; the 720 orders of six images are equally likely from 16 on


class Permutation:
    """One permutation of 0..size-1, drawn by a generator.

    Args:
        size: N, 1 <= N < 2**62.
        rng: draws the keys of the rounds.
    """

    def __init__(self, size: int, rng: np.random.Generator):
        if not 1 <= size < 2**62:
            raise ValueError(f"need 1 <= size < 2**62, got {size}")
        self._size = size
        a = math.isqrt(size - 1) + 1
        self._sides = np.uint64(a), np.uint64(-(-size // a))
        self._keys = rng.integers(2**64, size=_ROUNDS, dtype=np.uint64)

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Map positions to their permuted numbers.

        Args:
            positions: of any shape, in 0..size-1.

        Returns:
            Numbers in 0..size-1 of the same shape, distinct for distinct positions.
        """
        result = self._apply_rounds(positions.astype(np.uint64))
        while (outside := result >= self._size).any():
            result[outside] = self._apply_rounds(result[outside])
        return result.astype(np.int64)

    def _apply_rounds(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        a, b = self._sides
        left, right = np.divmod(numbers, b)
        for key_left, key_right in self._keys.reshape(-1, 2):
            _add(left, hash64(right, key_left), a)
            _add(right, hash64(left, key_right), b)
        return left * b + right


def _add(numbers: NDArray[np.uint64], hashed: NDArray[np.uint64], side: np.uint64) -> None:
    """Add hashes, scaled to 0..side-1, modulo side; in place."""
    hashed >>= np.uint64(32)
    hashed *= side
    hashed >>= np.uint64(32)
    numbers += hashed
    np.subtract(numbers, side, out=numbers, where=numbers >= side)


def hash64(numbers: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """64 well mixed bits of a number and a key."""
    mixed = numbers + key  # modulo 2**64, like all steps here
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
