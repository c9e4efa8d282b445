"""Which texts came before: a set of 64-bit digests that grows by 8 to 16 bytes a document.

That is about a hundredth of a review's length, so what memory it takes is noise beside the job's
own. Two different texts share a digest with a chance of n^2 / 2^65: one in 3,700 at 100 million.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]


class DigestSet:
    """A set of digests as sorted runs of falling length, merged as in a log-structured tree."""

    def __init__(self) -> None:
        self._runs: list[U64] = []

    def __len__(self) -> int:
        return sum(len(run) for run in self._runs)

    def __contains__(self, digest: int) -> bool:
        return bool(self.holds(np.array([digest], np.uint64))[0])

    def holds(self, digests: U64) -> Bools:
        """Say which of the digests [n] are in the set."""
        found = np.zeros(len(digests), np.bool_)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, digests), len(run) - 1)
            found |= run[at] == digests
        return found

    def add(self, digests: U64) -> Bools:
        """Add digests [n] in order; say which were new (of equal ones, the first)."""
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
