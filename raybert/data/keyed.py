"""Pure functions of a key: hashes of numbers and texts, uniform numbers and permutations.

Nothing here has state, so any worker can compute any draw of any step, in any order. The mixing
function is the finalizer of SplitMix64 (Steele, Lea and Flood, 2014, doi:10.1145/2660193.2660195).
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def key_of(*words: int | str) -> int:
    """Hash integers and names into one 64-bit key, which depends on their order."""
    state = 0
    for word in words:
        if isinstance(word, str):
            word = int.from_bytes(word.encode("utf-8"), "little")
        while True:  # 64 bits at a time
            state = _mix_int((state ^ (word & _MASK)) + _GOLDEN & _MASK)
            word >>= 64
            if word in (0, -1):
                break
    return state


def keyed_hash(key: int, *coordinates: npt.ArrayLike) -> U64:
    """Hash integer coordinates, which are broadcast, under a key to uint64."""
    state = np.asarray(key, np.uint64)
    for coordinate in coordinates:
        state = _mix((state ^ np.asarray(coordinate).astype(np.uint64)) + np.uint64(_GOLDEN))
    return np.asarray(state, np.uint64)


def keyed_uniform(key: int, *coordinates: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Uniform float32 numbers in [0, 1) with 24 bits, one for each combination of coordinates."""
    return (keyed_hash(key, *coordinates) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def text_hash(text: str, key: int) -> int:
    """A keyed 64-bit hash of a text, the same on every machine."""
    return int.from_bytes(text_digest(text, key)[:8], "little")


def text_digest(text: str, key: int) -> bytes:
    """A keyed digest of 16 bytes, equal for texts that differ only in white space."""
    secret = key.to_bytes(16, "little", signed=True)
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16, key=secret).digest()


class Permutation:
    """A keyed permutation of 0..size-1; each value costs constant time and memory.

    A balanced Feistel network over the next even power of two, applied until the value is below
    size (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, section
    3).
    """

    _ROUNDS = 6

    def __init__(self, size: int, key: int) -> None:
        """Set up the permutation of `size` numbers for `key`."""
        self.size = size
        self._half = np.uint64(max(1, (max(1, size - 1).bit_length() + 1) // 2))
        self._low = np.uint64((1 << int(self._half)) - 1)
        self._keys = [np.uint64(key_of(key, r)) for r in range(self._ROUNDS)]

    def __call__(self, positions: npt.ArrayLike) -> I64:
        """Map positions (any shape, each in 0..size-1) to their permuted values, int64."""
        given = np.asarray(positions, np.int64)
        values = self._encrypt(given.astype(np.uint64).ravel())
        outside = np.flatnonzero(values >= np.uint64(self.size))
        while outside.size:
            values[outside] = self._encrypt(values[outside])
            outside = outside[values[outside] >= np.uint64(self.size)]
        return values.astype(np.int64).reshape(given.shape)

    def inverse(self, value: int) -> int:
        """Return the position whose permuted value is `value`."""
        walked = np.asarray([value], np.uint64)
        while True:
            left, right = walked >> self._half, walked & self._low
            for key in reversed(self._keys):
                left, right = right ^ (_mix(left ^ key) & self._low), left
            walked = (left << self._half) | right
            if walked[0] < self.size:
                return int(walked[0])

    def _encrypt(self, values: U64) -> U64:
        left, right = values >> self._half, values & self._low
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._low)
        return (left << self._half) | right


def _mix(z: U64) -> U64:
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _mix_int(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)
