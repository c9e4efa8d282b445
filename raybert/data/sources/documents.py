"""Read a source as a stream of documents.

A source is a list of shards in the order of the configuration, then of the files' addresses.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from raybert.data.sources import datasets
from raybert.data.sources.files import (
    Columns,
    File,
    Purpose,
    Row,
    Shard,
    group_small_files,
    list_files,
)
from raybert.data.sources.formats import FORMATS, format_of, reader_of, suffixes
from raybert.data.sources.row_table import LabelParser, RowTable, accept, first_good
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


def read(
    shard: Shard, config: SourceConfig, *, labels: LabelParser | None = None
) -> Iterator[pa.Table]:
    """Read a shard in batches of bounded size, good rows and bad ones, in a fixed order.

    The columns are those of `schema_of`; `label` is null where no labels are wanted. A DataError if
    the file is cut short or lacks a column.
    """
    table = RowTable(config, labels)
    good = 0
    for file, row in _rows(shard, config, labels is not None):
        good += table.add(row, file.name)
        if table.is_full:
            yield table.flush()
        if good == config.limit:  # no shard has to give more than the limit of the whole source
            break
    if len(table):
        yield table.flush()


def _rows(shard: Shard, config: SourceConfig, labels: bool) -> Iterator[tuple[File, Row]]:
    given = config.label_column
    label = given if isinstance(given, str) else tuple(given)
    columns = Columns(config.text_column, label if labels else None, config.other_columns)
    reader = reader_of(shard.reader)
    return ((file, row) for file in shard.files for row in reader(file, shard, columns))


def raw_rows(config: SourceConfig, count: int) -> list[Row]:
    """The first rows of a labelled source as they are in the files, unchecked."""
    rows = (row for shard in shards(config, labels=True) for _, row in _rows(shard, config, True))
    return list(itertools.islice(rows, count))


def column_names(config: SourceConfig) -> list[str]:
    """The columns of a labelled source's first file; empty for formats without columns."""
    shard = shards(config, labels=True)[0]
    find = FORMATS[shard.reader].columns if shard.reader in FORMATS else None
    return [] if find is None else find(shard.files[0])


def documents(
    config: SourceConfig,
    *,
    labels: LabelParser | None = None,
    skipped: Counter[str] | None = None,
) -> Iterator[pa.Table]:
    """Read a source in this process: tables of bounded size, in a fixed order.

    The columns are text, label and `other_columns`. With `labels` every row must have a label;
    otherwise they are null. `skipped` counts the rows left out, by problem. A DataError as in
    `accept`, and if there are no documents at all.
    """
    left = config.limit
    skipped = Counter() if skipped is None else skipped
    names = ["text", "label", *config.other_columns]
    is_empty = True
    for shard in shards(config, labels=labels is not None):
        for table in read(shard, config, labels=labels):
            table = accept(first_good(table, left), config.on_bad_row, skipped)
            left = None if left is None else left - table.num_rows
            if table.num_rows:
                is_empty = False
                yield table.select(names)
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
