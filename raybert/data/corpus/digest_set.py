"""A set of 64-bit text digests, to find duplicates in 8 to 16 bytes of memory per document.

That is about a hundredth of a review's length, little compared with the memory of the job. The
probability that two of n different texts share a digest is n^2 / 2^65: one in 3,700 at 100 million.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]


class DigestSet:
    """A set of digests, stored as sorted runs of decreasing length (a log-structured merge)."""

    def __init__(self) -> None:
        self._runs: list[U64] = []

    def holds(self, digests: U64) -> Bools:
        """Return which of the digests [n] are in the set, bool [n]."""
        found = np.zeros(len(digests), np.bool_)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, digests), len(run) - 1)
            found |= run[at] == digests
        return found

    def add(self, digests: U64) -> Bools:
        """Add digests [n]; return which are new, bool [n] (of equal ones, the first)."""
        values, first = np.unique(digests, return_index=True)
        unseen = ~self.holds(values)
        new = np.zeros(len(digests), np.bool_)
        new[first[unseen]] = True
        if unseen.any():
            run = values[unseen]
            while self._runs and len(self._runs[-1]) <= 2 * len(run):
                run = np.sort(np.concatenate([self._runs.pop(), run]))
            self._runs.append(run)
        return new
