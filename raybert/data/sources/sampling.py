"""A sample of a source's documents for `limit`: seeded, in the proportions of the labels.

A document is chosen by a keyed hash of its text, so the sample depends neither on the order of the
rows nor on how files divide them. One pass keeps the smallest hashes of each label and where their
rows are, no texts; the readers then skip all other rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raybert.data.keyed import text_hash
from raybert.data.sources.files import Shard

_KEPT = 4  # times the size of the sample: entries of a label from which the largest are dropped
_STRATA = 2  # documents of each label at least, on average; with fewer the sample is a plain one

_Entries = npt.NDArray[np.void]
_ENTRY = np.dtype([("hash", np.uint64), ("shard", np.int32), ("row", np.int64)])


class _Smallest:
    """The entries with the `count` smallest hashes of those added."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._added: list[_Entries] = []
        self.kept = self.total = 0  # entries

    def add(self, entries: _Entries) -> None:
        """Add entries, in the order of their rows."""
        self._added.append(entries)
        self.kept += len(entries)
        self.total += len(entries)
        if self.kept > _KEPT * self._count:
            self._added = [self.take(self._count)]
            self.kept = len(self._added[0])

    def take(self, count: int) -> _Entries:
        """The smallest `count`, of equal hashes the first ones."""
        merged = np.concatenate(self._added)
        return merged[np.lexsort((merged["row"], merged["shard"], merged["hash"]))[:count]]


class Sampler:
    """Draws a sample of `size` documents from all that it is shown."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self._strata: dict[str | None, _Smallest] = {}

    def add(self, table: pa.Table, shard: int, begin: int) -> None:
        """Take note of the good rows of a table, which is the shard's from row `begin` on."""
        problems, texts = table.column("problem"), table.column("text").to_pylist()
        labels = table.column("label").to_pylist()
        rows: dict[str | None, list[tuple[int, int, int]]] = {}
        for at, problem in enumerate(problems.to_pylist()):
            if problem is None:
                entry = (text_hash(texts[at], self._seed), shard, begin + at)
                rows.setdefault(labels[at], []).append(entry)
        for label, entries in rows.items():
            stratum = self._strata.setdefault(label, _Smallest(self._size))
            stratum.add(np.array(entries, _ENTRY))

    def choose(self, shards: Sequence[Shard]) -> list[Shard]:
        """The shards with the rows of the sample; all their rows if there are no more than that."""
        totals = {label: stratum.total for label, stratum in self._strata.items()}
        if sum(totals.values()) <= self._size:
            return list(shards)
        if len(totals) * _STRATA > self._size:
            merged = _Smallest(self._size)
            for stratum in self._strata.values():
                merged.add(stratum.take(self._size))
            chosen = [merged.take(self._size)]
        else:
            sizes = quotas(totals, self._size)
            chosen = [stratum.take(sizes[label]) for label, stratum in self._strata.items()]
        entries = np.concatenate(chosen)
        found = []
        for index, shard in enumerate(shards):
            rows = np.sort(entries["row"][entries["shard"] == index])
            if len(rows):
                found.append(replace(shard, rows=rows.tobytes()))
        return found


def quotas(totals: Mapping[str | None, int], size: int) -> dict[str | None, int]:
    """Divide `size` in the proportions of `totals`, by largest remainders, at least 1 for each."""
    whole = sum(totals.values())
    shares = {label: size * total / whole for label, total in totals.items()}
    found = {label: max(1, int(share)) for label, share in shares.items()}
    # The labels that are furthest below their share, or above it, in a fixed order.
    while (left := size - sum(found.values())) != 0:
        step = 1 if left > 0 else -1
        order = sorted(
            (label for label in found if step > 0 or found[label] > 1),
            key=lambda label: (step * (found[label] - shares[label]), str(label)),
        )
        for label in order[: abs(left)]:
            found[label] += step
    return found


def chosen_rows(shard: Shard) -> Iterator[int] | None:
    """The row numbers of a shard's sample, ascending; None: all rows."""
    if shard.rows is None:
        return None
    rows: list[int] = np.frombuffer(shard.rows, np.int64).tolist()
    return iter(rows)
