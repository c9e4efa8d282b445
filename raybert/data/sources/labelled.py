"""Labelled documents in memory: labels as numbers, and a split by a hash of the text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute

from raybert.data.sources.documents import documents
from raybert.data.sources.settings import SourceConfig
from raybert.data.text import text_hash
from raybert.errors import DataError


class Labelled(NamedTuple):
    """Labelled documents in memory: the texts are Arrow arrays, so that millions fit."""

    texts: pa.ChunkedArray  # [rows] string
    labels: npt.NDArray[np.int64]  # [rows], positions in `names`
    names: list[str]
    skipped: dict[str, int]  # rows left out, by problem

    def take(self, rows: npt.NDArray[np.int64]) -> Labelled:
        """Select rows [n] by their numbers."""
        return self._replace(texts=self.texts.take(pa.array(rows)), labels=self.labels[rows])


def labelled(
    config: SourceConfig,
    *,
    split: str | list[str] | None = None,
    names: list[str] | None = None,
) -> Labelled:
    """Read labelled documents and number their labels.

    Args:
        config: the source.
        split: replaces the configured split.
        names: a model's labels in the order of their ids; replaces configured ones.

    Raises:
        DataError: as `documents`; an unknown label; fewer than two labels.
    """
    update: dict[str, Any] = {}
    if split is not None:
        update["split"] = split
    if names is not None:
        update["labels"] = names
    config = config.model_copy(update=update)
    skipped: Counter[str] = Counter()
    table = pa.concat_tables(documents(config, labels=True, skipped=skipped))
    if config.labels is not None:
        found = config.labels
    else:
        found = sorted(table.column("label").unique().to_pylist(), key=_sort_key)
        if len(found) < 2:
            raise DataError(
                f"{', '.join(config.paths)}: every row has the label {found[0]!r}; a classifier "
                "needs two, so check label_column and split"
            )
    ids = pa.compute.index_in(table.column("label"), value_set=pa.array(found, pa.string()))
    return Labelled(table.column("text"), ids.to_numpy().astype(np.int64), found, dict(skipped))


def _sort_key(label: str) -> tuple[int, int, str]:
    """Sort integers first and by value, then names alphabetically."""
    return (0, int(label), "") if re.fullmatch(r"-?\d+", label) else (1, 0, label)


class Split(NamedTuple):
    """The row numbers of two parts of one set, ascending."""

    rest: npt.NDArray[np.int64]
    held: npt.NDArray[np.int64]


def split_rows(texts: Iterable[str | None], rows: int, *, seed: int = 0) -> Split:
    """Hold out `rows` rows by a keyed hash of their text; copies of a text stay in one part.

    The choice does not depend on the order of the rows. Where copies make an exact split
    impossible, fewer rows are held out.
    """
    hashes = np.fromiter((text_hash(str(text), seed) for text in texts), np.uint64)
    _, inverse, copies = np.unique(hashes, return_inverse=True, return_counts=True)
    held_groups = np.zeros(len(copies), np.bool_)
    left = rows
    for group, count in enumerate(copies.tolist()):
        if count <= left:
            held_groups[group] = True
            left -= count
        if not left:
            break
    held = held_groups[inverse] if len(hashes) else np.zeros(0, np.bool_)
    return Split(np.flatnonzero(~held), np.flatnonzero(held))
