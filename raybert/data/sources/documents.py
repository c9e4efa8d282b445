"""Where text comes from: files, archives and URIs, read as a stream of documents.

A source is a list of `Shard`s, each readable on its own on any machine, in an order that depends on
the files' names alone. Bad rows travel in the stream with what is wrong with them, so that whoever
consumes it, in order, decides (fail or skip) and counts: the same row fails however many read.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, field_validator

from raybert.config import Settings
from raybert.data.sources import files, formats
from raybert.data.sources.files import File, Kind, Purpose, Shard
from raybert.data.sources.formats import Columns, Row
from raybert.errors import DataError

__all__ = [
    "Split",
    "EvaluationSource",
    "Labelled",
    "Shard",
    "SourceConfig",
    "accept",
    "split_rows",
    "documents",
    "fingerprint",
    "labelled",
    "read",
    "shards",
]

_BATCH_ROWS = 2048
_BATCH_CHARS = 1 << 21
_SCHEMA = pa.schema(
    [
        ("text", pa.string()),  # null where there is a problem
        ("label", pa.string()),
        ("problem", pa.string()),  # why the row can't be used; null for a good one
        ("place", pa.string()),  # where a bad row stands; null for a good one
    ]
)


class SourceConfig(Settings):
    """A set of documents, labelled or not."""

    is_for_evaluation: ClassVar[bool] = False

    path: str | list[str] = Field(
        "sample:imdb",
        description="local paths, URIs that pyarrow's filesystems read, globs, or the embedded "
        "default: sample:imdb, sample:rotten-tomatoes, sample:all; {split} stands for `split`",
    )
    format: Literal["auto", "parquet", "csv", "jsonl", "text", "imdb"] = Field(
        "auto", description="auto: by the file's name (.gz and .zst are decompressed)"
    )
    split: str | list[str] | None = Field(
        None,
        description="which parts of the source: train, test, unsup of IMDB's archive; train, test "
        "of the sample; null: train for labels, all but test for a corpus, test for evaluation",
    )
    text_column: str = "text"
    label_column: str = "label"
    labels: list[str] | None = Field(
        None,
        description="the labels in the order of their ids: their names, or names for the integers "
        "0, 1, ... in the data; null: those found in the data, sorted",
    )
    document: Literal["line", "file"] = Field("line", description="what one document is, in text")
    html_breaks: Literal["space", "keep"] = Field(
        "space", description="what becomes of HTML line breaks (<br />)"
    )
    on_bad_row: Literal["fail", "skip"] = Field(
        "fail", description="rows that are empty, not UTF-8, without label, ...: stop or count"
    )
    limit: int | None = Field(None, ge=1, description="take the first so many documents")

    @field_validator("labels", mode="before")
    @classmethod
    def _labels(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        names = [str(name) for name in value]
        if len(set(names)) < len(names) or len(names) < 2:
            raise ValueError(f"labels={value}: expected two or more different labels")
        return names

    @field_validator("path")
    @classmethod
    def _path(cls, value: str | list[str]) -> str | list[str]:
        if not value or not all([value] if isinstance(value, str) else value):
            raise ValueError(
                f"path={value!r}: name a file, a folder, a glob, a URI, or sample:imdb"
            )
        return value

    @property
    def paths(self) -> list[str]:
        """The configured paths as a list."""
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def splits(self) -> list[str] | None:
        """The configured splits as a list; None where none is configured."""
        return [self.split] if isinstance(self.split, str) else self.split


class EvaluationSource(SourceConfig):
    """Documents that nothing is trained on: an unset split means test where there are splits."""

    is_for_evaluation: ClassVar[bool] = True


def shards(config: SourceConfig, *, labels: bool = False) -> list[Shard]:
    """List what `read` can read, in the order in which the documents come.

    Args:
        config: the source.
        labels: whether labels are wanted; with the source's class it decides the default split.

    Raises:
        DataError: a missing file, an empty glob or folder, an unknown format or split.
        UserError: `sample:` without the package that holds it.
    """
    purpose: Purpose = "train" if labels else "corpus"
    if config.is_for_evaluation:
        purpose = "evaluate"
    return [
        shard
        for path in config.paths
        for shard in files.find(path, config.format, config.document, config.splits, purpose)
    ]


def fingerprint(config: SourceConfig, *, labels: bool = False) -> list[list[Any]]:
    """What identifies the source's content without reading it: [path, size, mtime in ns] a file.

    Files of a `sample:` count by name and size alone: they are installed anew with the package.
    """
    return [
        [file.name, file.size, None if shard.kind == "sample" else file.mtime]
        for shard in shards(config, labels=labels)
        for file in shard.files
    ]


def read(shard: Shard, config: SourceConfig, *, labels: bool = False) -> Iterator[pa.Table]:
    """Read a shard in bounded batches, good rows and bad, in a fixed order.

    Returns:
        Tables with columns text, label, problem, place, all string; for a good row problem and
        place are null, for a bad one text is. `label` is null unless `labels` is asked for.

    Raises:
        DataError: what makes the file unreadable as a whole: cut short, a column missing.
    """
    judge = _Judge(config, labels)
    columns = Columns(config.text_column, config.label_column if labels else None)
    good = 0
    for file in shard.files:
        for row in _rows(file, shard, columns, labels):
            good += judge.add(row, file, shard.unit)
            if judge.is_full:
                yield judge.flush()
            if good == config.limit:  # a shard never needs to give more than the whole may
                break
        if good == config.limit:
            break
    if judge.rows:
        yield judge.flush()


def peek(config: SourceConfig) -> None:
    """Read a labelled source's first batch of rows, to find mistakes that all rows share.

    Raises:
        DataError: as `documents`, for these rows.
    """
    one = config.model_copy(update={"limit": 1})
    next(documents(one, labels=True))


def documents(
    config: SourceConfig, *, labels: bool = False, skipped: Counter[str] | None = None
) -> Iterator[pa.Table]:
    """Read a whole source in this process, in bounded batches and in a fixed order.

    Args:
        config: the source.
        labels: whether every row must have a label.
        skipped: is given the number of rows left out, by reason (`on_bad_row: skip`).

    Returns:
        Tables with columns text: string and label: string (null unless `labels`).

    Raises:
        DataError: the first bad row (`on_bad_row: fail`), an unreadable file, no documents at all.
    """
    left = config.limit
    skipped = Counter() if skipped is None else skipped
    empty = True
    for shard in shards(config, labels=labels):
        for table in read(shard, config, labels=labels):
            table = accept(first_good(table, left), config.on_bad_row, skipped)
            left = None if left is None else left - table.num_rows
            if table.num_rows:
                empty = False
                yield table.select(["text", "label"])
            if left == 0:
                return
    if empty:
        raise no_documents(config, skipped)


def first_good(table: pa.Table, count: int | None) -> pa.Table:
    """Cut a table after so many good rows, so that no later row is judged; None cuts nothing."""
    if count is None or count >= table.num_rows:
        return table
    good = table.column("problem").is_null().to_numpy()
    return table.slice(0, int(np.searchsorted(np.cumsum(good), count)) + 1 if count else 0)


def accept(table: pa.Table, on_bad_row: str, skipped: Counter[str]) -> pa.Table:
    """Drop and count a table's bad rows, or raise for the first one.

    Raises:
        DataError: `on_bad_row` is fail and there is a bad row.
    """
    problems = table.column("problem")
    if problems.null_count == len(problems):
        return table
    for row in table.select(["problem", "place"]).to_pylist():
        if row["problem"] is None:
            continue
        if on_bad_row == "fail":
            raise DataError(
                f"{row['place']}: {row['problem']}; mend the row, or set on_bad_row: skip "
                "beside its source's path"
            )
        skipped[_reason(row["problem"])] += 1
    return table.filter(problems.is_null())


def no_documents(config: SourceConfig, skipped: Mapping[str, int]) -> DataError:
    """The error for a source that has nothing to read."""
    told = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
    return DataError(
        f"{', '.join(config.paths)}: no documents" + (f" (skipped: {told})" if told else "")
    )


class Labelled(NamedTuple):
    """Labelled documents in memory: Arrow for the texts, so that millions fit."""

    texts: pa.ChunkedArray  # [B] string
    labels: npt.NDArray[np.int64]  # [B], positions in `names`
    names: list[str]
    skipped: dict[str, int]  # rows left out, by reason

    def take(self, rows: npt.NDArray[np.int64]) -> Labelled:
        """The same labels, other rows."""
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
        names: the labels that a model knows, in the order of its ids; replaces configured ones.

    Raises:
        DataError: as `documents`; a label that is not in the set; fewer than two labels.
    """
    update: dict[str, Any] = {}
    if split is not None:
        update["split"] = split
    if names is not None:
        update["labels"] = names
    config = config.model_copy(update=update)
    skipped: Counter[str] = Counter()
    tables = list(documents(config, labels=True, skipped=skipped))
    table = pa.concat_tables(tables)
    if config.labels is not None:
        found = config.labels
    else:
        found = sorted(set(table.column("label").unique().to_pylist()), key=_natural)
        if len(found) < 2:
            raise DataError(
                f"{', '.join(config.paths)}: every row has the label {found[0]!r}; a classifier "
                "needs two, so check label_column and split"
            )
    ids = pa.compute.index_in(table.column("label"), value_set=pa.array(found, pa.string()))
    return Labelled(table.column("text"), ids.to_numpy().astype(np.int64), found, dict(skipped))


class Split(NamedTuple):
    """Row numbers, ascending, of two parts of one set."""

    rest: npt.NDArray[np.int64]
    held: npt.NDArray[np.int64]


def split_rows(texts: Iterable[str | None], rows: int, *, seed: int = 0) -> Split:
    """Set `rows` rows apart by a keyed hash of their text, all copies of a text on one side.

    The choice does not depend on the order of the rows. Where copies make an exact cut impossible,
    fewer rows are held.
    """
    hashes = np.fromiter((files.text_hash(str(text), seed) for text in texts), np.uint64)
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


def _natural(label: str) -> tuple[int, int, str]:
    """Integers first and by value, then names alphabetically."""
    return (0, int(label), "") if re.fullmatch(r"-?\d+", label) else (1, 0, label)


def _rows(file: File, shard: Shard, columns: Columns, labels: bool) -> Iterator[Row]:
    kind: Kind = shard.kind
    if kind == "parquet":
        with file.open_seekable() as stream:
            yield from formats.read_parquet(stream, file.name, columns)
        return
    with file.open_stream() as stream:
        if kind == "sample":
            yield from files.read_sample(stream, shard, labels)
        elif kind == "imdb-archive":
            yield from formats.read_imdb(stream, file.name, shard.place)
        elif kind == "imdb-file":
            found = shard.place(file.path)
            yield from (
                row._replace(label=found[1] if found else None)
                for row in formats.read_whole(stream, file.name)
            )
        elif kind == "csv":
            delimiter = "\t" if ".tsv" in Path(file.path).suffixes else ","
            yield from formats.read_csv(stream, file.name, columns, delimiter)
        elif kind == "jsonl":
            yield from formats.read_jsonl(stream, file.name, columns)
        elif labels:
            raise DataError(
                f"{file.name}: plain text has no labels; use csv, jsonl or parquet, or a folder "
                "laid out as aclImdb"
            )
        elif shard.document == "file":
            yield from formats.read_whole(stream, file.name)
        else:
            yield from formats.read_lines(stream, file.name)


class _Judge:
    """Collects rows as a table: text cleaned, labels normalised, problems named."""

    def __init__(self, config: SourceConfig, labels: bool) -> None:
        self._config, self._wants_label = config, labels
        self._known = set(config.labels or ())
        self._start()

    def _start(self) -> None:
        self._columns: tuple[list[str | None], ...] = ([], [], [], [])
        self._chars = 0

    @property
    def rows(self) -> int:
        return len(self._columns[0])

    @property
    def is_full(self) -> bool:
        return self._chars >= _BATCH_CHARS or self.rows >= _BATCH_ROWS

    def flush(self) -> pa.Table:
        table = pa.table([pa.array(c, pa.string()) for c in self._columns], schema=_SCHEMA)
        self._start()
        return table

    def add(self, row: Row, file: File, unit: str) -> bool:
        """Add a row; True if it is a good one."""
        text, problem = (None, row.problem) if row.problem else self._clean(row.text)
        label = None
        if self._wants_label and problem is None:
            label, problem = self._label(row.label)
        texts, labels, problems, places = self._columns
        labels.append(label)
        problems.append(problem)
        if problem is None:
            assert text is not None
            self._chars += len(text)
            texts.append(text)
            places.append(None)
            return True
        texts.append(None)
        at = row.place if isinstance(row.place, str) else f"{unit} {row.place}" if unit else None
        place = f"{file.name}: {at}" if at else file.name
        places.append(place.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))
        return False

    def _clean(self, value: Any) -> tuple[str | None, str | None]:
        if isinstance(value, bytes):
            try:
                text = value.decode("utf-8")
            except UnicodeDecodeError as error:
                return None, f"not UTF-8 (byte {error.start + 1} is 0x{value[error.start]:02x})"
        elif isinstance(value, str):
            text = value
            if not text.isascii():
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError as error:
                    shown = f"character {error.start + 1}"
                    escaped = ord(text[error.start]) - 0xDC00
                    if 0x80 <= escaped <= 0xFF:  # how surrogateescape keeps a byte
                        shown += f" is byte 0x{escaped:02x}"
                    return None, f"not UTF-8 ({shown})"
        elif value is None:
            return None, "empty"
        else:
            return None, f"not text ({type(value).__name__})"
        if self._config.html_breaks == "space" and "<" in text:
            text = files.LINE_BREAK.sub(" ", text)
        text = text.strip()
        return (text, None) if text else (None, "empty")

    def _label(self, value: Any) -> tuple[str | None, str | None]:
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        elif isinstance(value, bool):
            value = str(value).lower()
        elif isinstance(value, float) and value.is_integer():  # integers beside a null, by pandas
            value = int(value)
        elif isinstance(value, list | dict):
            return None, f"label is no name or number ({type(value).__name__})"
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None, "no label"
        label = str(value).strip()
        if not label:
            return None, "no label"
        if not label.isascii() and any(0xD800 <= ord(c) <= 0xDFFF for c in label):
            return None, "label is not UTF-8"
        names = self._config.labels
        if names is None or label in self._known:
            return label, None
        # Where names are numbers themselves, a number is a name: stars from 1 to 5 have no 0.
        numbered = not any(name.isdecimal() for name in names)
        if numbered and label.isdecimal() and int(label) < len(names):
            return names[int(label)], None
        return None, f"label {label!r} is not one of labels={names}"


def _reason(problem: str) -> str:
    """The problem without its particulars, as it is counted."""
    return "unknown label" if problem.startswith("label '") else problem.split(" (")[0]
