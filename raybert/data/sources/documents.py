"""Read a source as a stream of documents, or its labelled documents into memory.

A source is a list of shards in the order of the configuration, then of the files' addresses.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute

from raybert.data.keyed import text_hash
from raybert.data.sources import datasets
from raybert.data.sources.files import Columns, File, Purpose, Shard, group_small_files, list_files
from raybert.data.sources.formats import FORMATS, format_of, reader_of, suffixes
from raybert.data.sources.row_table import RowTable, accept, first_good
from raybert.data.sources.settings import SourceConfig
from raybert.errors import DataError


def shards(config: SourceConfig, *, labels: bool = False) -> list[Shard]:
    """List the shards of a source, in the order of its documents.

    `labels` and the source's class decide the default split. A DataError for a missing file or an
    unknown format or split; a UserError for `sample:` without its package.
    """
    purpose: Purpose = "train" if labels else "corpus"
    if config.is_for_evaluation:
        purpose = "evaluate"
    return [
        shard
        for path in config.paths
        for shard in _find_shards(path, config.format, config.document, config.splits, purpose)
    ]


def _find_shards(
    path: str, format: str, document: str, splits: list[str] | None, purpose: Purpose
) -> list[Shard]:
    """List the shards of one configured path; without `splits` those of the purpose are read."""
    if path.startswith("sample:"):
        return [datasets.sample_shard(path, splits, purpose)]
    if "{split}" in path:
        if not splits:
            raise DataError(f"{path}: set split to the names that replace {{split}}")
        expanded = [path.replace("{split}", split) for split in splits]
        return [s for p in expanded for s in _find_shards(p, format, document, None, purpose)]
    files, folder = list_files(path)
    if not files:
        raise DataError(f"{path}: no files here; name a file, or a glob such as {path}/*.txt")
    if format == "imdb" or (format == "auto" and datasets.is_imdb(files)):
        return datasets.imdb_shards(path, files, splits, purpose)
    if splits:
        raise DataError(
            f"{path}: split={', '.join(splits)} is for IMDB's archive and the sample; for other "
            "files write {split} in the path in place of its name, or leave split out"
        )
    if format != "auto":
        return list(group_small_files([(format, file) for file in files], (), document))
    return list(group_small_files(_recognized(path, files, folder is not None), (), document))


def _recognized(path: str, files: list[File], is_folder: bool) -> list[tuple[str, File]]:
    """Pair files with their formats. In a folder or glob, other files (a README) are left out."""
    found = [(format, file) for file in files if (format := format_of(file)) is not None]
    if found:
        return found
    message = f"holds no {', '.join(suffixes())} files; set format to what it holds"
    if not is_folder:
        known = ", ".join([*FORMATS, "imdb"])
        message = f"format=auto does not know this suffix; set format to one of {known}"
    raise DataError(f"{path}: {message}")


def fingerprint(config: SourceConfig, *, labels: bool = False) -> list[list[Any]]:
    """Identify the source's content without reading it: [path, size, mtime in ns] of every file."""
    return [
        [file.name, file.size, file.mtime]
        for shard in shards(config, labels=labels)
        for file in shard.files
    ]


def read(shard: Shard, config: SourceConfig, *, labels: bool = False) -> Iterator[pa.Table]:
    """Read a shard in batches of bounded size, good rows and bad ones, in a fixed order: `SCHEMA`.

    `label` is null unless `labels` is set. A DataError if the file is cut short or lacks a column.
    """
    table = RowTable(config, labels)
    columns = Columns(config.text_column, config.label_column if labels else None)
    reader = reader_of(shard.reader)
    good = 0
    for file, row in ((f, row) for f in shard.files for row in reader(f, shard, columns)):
        good += table.add(row, file.name)
        if table.is_full:
            yield table.flush()
        if good == config.limit:  # no shard has to give more than the limit of the whole source
            break
    if len(table):
        yield table.flush()


def peek(config: SourceConfig) -> None:
    """Read the first document of a labelled source, to find mistakes that all rows share."""
    one = config.model_copy(update={"limit": 1})
    next(documents(one, labels=True))


def documents(
    config: SourceConfig, *, labels: bool = False, skipped: Counter[str] | None = None
) -> Iterator[pa.Table]:
    """Read a source in this process: tables of text and label, of bounded size, in a fixed order.

    With `labels` every row must have one; otherwise they are null. `skipped` counts the rows left
    out, by problem. A DataError as in `accept`, and if there are no documents at all.
    """
    left = config.limit
    skipped = Counter() if skipped is None else skipped
    is_empty = True
    for shard in shards(config, labels=labels):
        for table in read(shard, config, labels=labels):
            table = accept(first_good(table, left), config.on_bad_row, skipped)
            left = None if left is None else left - table.num_rows
            if table.num_rows:
                is_empty = False
                yield table.select(["text", "label"])
            if left == 0:
                return
    if is_empty:
        raise no_documents(config, skipped)


def no_documents(config: SourceConfig, skipped: Mapping[str, int]) -> DataError:
    """The error for a source without a usable document."""
    counts = ", ".join(f"{count:,} {problem}" for problem, count in sorted(skipped.items()))
    return DataError(
        f"{', '.join(config.paths)}: no documents" + (f" (skipped: {counts})" if counts else "")
    )


class Labelled(NamedTuple):
    """Labelled documents in memory: the texts are Arrow arrays, so that millions fit."""

    texts: pa.ChunkedArray  # [rows] string
    labels: npt.NDArray[np.int64]  # [rows], positions in `names`
    names: list[str]
    skipped: dict[str, int]  # rows left out, by problem

    def take(self, rows: npt.NDArray[np.int64]) -> Labelled:
        """Select rows [n] by their numbers."""
        return self._replace(texts=self.texts.take(pa.array(rows)), labels=self.labels[rows])


def labelled(config: SourceConfig, *, names: list[str] | None = None) -> Labelled:
    """Read labelled documents and number their labels, in the order of `names` if given.

    A DataError as in `documents`, and for less than two labels.
    """
    if names is not None:
        config = config.model_copy(update={"labels": names})
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
    heldout: npt.NDArray[np.int64]


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
    heldout = held_groups[inverse] if len(hashes) else np.zeros(0, np.bool_)
    return Split(np.flatnonzero(~heldout), np.flatnonzero(heldout))
