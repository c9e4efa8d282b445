"""Labelled texts in memory: which task they are for, and their splits.

A split holds out units: all rows of a group, or all copies of a text. A keyed hash of the unit
decides, so the choice depends neither on the order of the rows nor on other files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raybert.data.keyed import text_hash
from raybert.data.sources.columns import with_usual_columns
from raybert.data.sources.documents import documents, raw_rows
from raybert.data.sources.settings import SourceConfig
from raybert.errors import DataError
from raybert.tasks.protocol import TextTask
from raybert.tasks.registry import choose_task

_STRATA = 100  # classes at most, each of which a random split shall have
_SAMPLED_ROWS = 1000  # by whose labels a task is chosen
_Rows = npt.NDArray[np.int64]


class Labelled(NamedTuple):
    """Labelled documents in memory: the texts are Arrow arrays, so that millions fit."""

    texts: pa.ChunkedArray  # [rows] string
    labels: pa.ChunkedArray  # [rows] string, as the task's parser gives them
    pairs: pa.ChunkedArray | None  # [rows] string, the second texts
    groups: pa.ChunkedArray | None  # [rows] string
    skipped: dict[str, int]  # rows left out, by problem

    def take(self, rows: _Rows) -> Labelled:
        """Select rows [n] by their numbers."""
        chosen = pa.array(rows)
        return Labelled(
            self.texts.take(chosen),
            self.labels.take(chosen),
            None if self.pairs is None else self.pairs.take(chosen),
            None if self.groups is None else self.groups.take(chosen),
            self.skipped,
        )


def read_labelled(
    config: SourceConfig, task: type[TextTask], names: list[str] | None = None
) -> Labelled:
    """Read labelled documents; `names`, a model's labels, replace the configured ones.

    Raises:
        DataError: as `documents`.
    """
    if names is not None:
        config = config.model_copy(update={"labels": names})
    skipped: Counter[str] = Counter()
    table = pa.concat_tables(documents(config, labels=task.parser(config), skipped=skipped))
    columns = {name: table.column(name) for name in table.column_names}
    return Labelled(
        columns["text"],
        columns["label"],
        columns.get("pair"),
        columns.get("group"),
        dict(skipped),
    )


class ResolvedSource(NamedTuple):
    """A source with the columns that were found, its task, and a line about both."""

    source: SourceConfig
    task: type[TextTask]
    description: str


def resolve_source(config: SourceConfig, task: str = "auto") -> ResolvedSource:
    """Find the columns of texts and labels where they are not configured, and the task.

    Raises:
        DataError: as `documents`, for what is wrong with the first rows.
    """
    config, found = with_usual_columns(config)
    labels = config.label_column
    if config.text_column in ([labels] if isinstance(labels, str) else labels):
        raise DataError(
            f"text_column and label_column are both {config.text_column!r}; name the column of the "
            "labels with --label-column"
        )
    rows = [row for row in raw_rows(config, _SAMPLED_ROWS) if row.problem is None]
    chosen = choose_task(task, [row.text for row in rows], [row.label for row in rows])
    reasons = [*found, chosen.reason]
    if config.pair_column is not None and not chosen.task.accepts_pairs:
        raise DataError(
            f"pair_column={config.pair_column}: {chosen.task.name} reads one text, not pairs; "
            "leave pair_column out, or set finetune.task to another one"
        )
    peek(config, chosen.task)
    return ResolvedSource(config, chosen.task, f"{chosen.task.name} ({'; '.join(reasons)})")


def peek(config: SourceConfig, task: type[TextTask]) -> None:
    """Read the first document of a labelled source, to find mistakes that all rows share."""
    first = config.model_copy(update={"limit": 1, "sample": "first"})
    next(documents(first, labels=task.parser(first)))


class Split(NamedTuple):
    """The row numbers of two parts of one set, ascending."""

    rest: _Rows
    heldout: _Rows


def split_rows(units: Iterable[str | None], rows: int, *, seed: int = 0) -> Split:
    """Hold out `rows` rows by a keyed hash of their unit; rows of one unit stay in one part.

    Where units make an exact split impossible, fewer rows are held out.
    """
    hashes = np.fromiter((text_hash(str(unit), seed) for unit in units), np.uint64)
    _, inverse, copies = np.unique(hashes, return_inverse=True, return_counts=True)
    held_units = np.zeros(len(copies), np.bool_)
    left = rows
    for unit, count in enumerate(copies.tolist()):
        if count <= left:
            held_units[unit] = True
            left -= count
        if not left:
            break
    held = held_units[inverse] if len(hashes) else np.zeros(0, np.bool_)
    return Split(np.flatnonzero(~held), np.flatnonzero(held))


def split_by_class(
    units: Sequence[str], classes: Sequence[str], fraction: float, *, seed: int = 0
) -> Split:
    """As `split_rows`, about the same fraction of each class.

    What rounding leaves over of a class is taken from the next one, so that classes of one text are
    held out, too.
    """
    sizes, held = Counter(units), set[str]()
    rows = taken = 0
    for members in _units_by_class(units, classes, seed).values():
        rows += sum(sizes[unit] for unit in members)
        for unit in members:
            if taken + sizes[unit] <= round(rows * fraction):
                held.add(unit)
                taken += sizes[unit]
    return _split(units, held)


def split_at_random(
    units: Sequence[str], classes: Sequence[str], fraction: float, *, seed: int = 0
) -> Split:
    """As `split_rows`; as `split_by_class` if that leaves a class out that has enough rows."""
    split = split_rows(units, round(len(units) * fraction), seed=seed)
    held = {classes[row] for row in split.heldout.tolist()}
    sizes = Counter(classes)
    is_lost = any(name not in held and size * fraction >= 1 for name, size in sizes.items())
    if is_lost and len(sizes) <= _STRATA:
        return split_by_class(units, classes, fraction, seed=seed)
    return split


def fold_rows(
    units: Sequence[str], classes: Sequence[str], fold: int, folds: int, *, seed: int = 0
) -> Split:
    """Hold out the `fold`-th of `folds` disjoint parts, each with about the same classes.

    Each unit goes to the part that has the fewest rows of its class, of equal ones the smallest.
    """
    sizes, held = Counter(units), set[str]()
    rows = [0] * folds  # of each part
    for members in _units_by_class(units, classes, seed).values():
        of_class = [0] * folds
        for unit in members:
            _, _, part = min(zip(of_class, rows, range(folds), strict=True))
            of_class[part] += sizes[unit]
            rows[part] += sizes[unit]
            if part == fold:
                held.add(unit)
    return _split(units, held)


def _units_by_class(
    units: Sequence[str], classes: Sequence[str], seed: int
) -> dict[str, list[str]]:
    """The units of each class, that of their first row, in the order of their hashes."""
    of_unit: dict[str, str] = {}
    for unit, name in zip(units, classes, strict=True):
        of_unit.setdefault(unit, name)
    found: dict[str, list[str]] = {name: [] for name in sorted(set(of_unit.values()))}
    for unit in sorted(of_unit, key=lambda unit: text_hash(unit, seed)):
        found[of_unit[unit]].append(unit)
    return found


def _split(units: Sequence[str], held: set[str]) -> Split:
    is_held = np.array([unit in held for unit in units], np.bool_)
    return Split(np.flatnonzero(~is_held), np.flatnonzero(is_held))


def units_of(labelled: Labelled, *, by_text: bool = False) -> list[str]:
    """What is never split: the group of each row, or its texts; `by_text`: always its texts."""
    if labelled.groups is not None and not by_text:
        return [str(group) for group in labelled.groups.to_pylist()]
    texts: list[str] = labelled.texts.to_pylist()
    if labelled.pairs is None:
        return texts
    return [f"{a}\0{b}" for a, b in zip(texts, labelled.pairs.to_pylist(), strict=True)]
