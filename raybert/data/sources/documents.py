"""Read a source as a stream of documents: files, archives, URIs or the embedded sample.

A source is a list of shards, each readable on any machine. Their order is that of the
configuration, then of the files' addresses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from raybert.data.sources import imdb, sample
from raybert.data.sources.formats import FORMATS, format_of, reader_of, suffixes
from raybert.data.sources.listing import list_files
from raybert.data.sources.row_table import RowTable, accept, first_good
from raybert.data.sources.settings import SourceConfig
from raybert.data.sources.shard import Columns, File, Purpose, Shard, group_small_files
from raybert.errors import DataError


def shards(config: SourceConfig, *, labels: bool = False) -> list[Shard]:
    """List the shards of a source, in the order of its documents.

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
        for shard in _find_shards(path, config.format, config.document, config.splits, purpose)
    ]


def _find_shards(
    path: str, format: str, document: str, splits: list[str] | None, purpose: Purpose
) -> list[Shard]:
    """List the shards of one configured path.

    Args:
        path: a file, folder, glob, URI or `sample:` name.
        format: auto, or the files' format.
        document: what one document is, in plain text: line or file.
        splits: the splits to read; None: those of the purpose, where the source has splits.
        purpose: what the texts are read for.

    Raises:
        DataError: nothing is there, an unknown format, a split that the source does not have.
        UserError: `sample:` without the package that holds it.
    """
    if path.startswith("sample:"):
        return [sample.find_shard(path, splits, purpose)]
    if "{split}" in path:
        if not splits:
            raise DataError(f"{path}: set split to the names that replace {{split}}")
        expanded = [path.replace("{split}", split) for split in splits]
        return [s for p in expanded for s in _find_shards(p, format, document, None, purpose)]
    files, folder = list_files(path)
    if not files:
        raise DataError(f"{path}: no files here; name a file, or a glob such as {path}/*.txt")
    if format == "imdb" or (format == "auto" and imdb.is_imdb(files)):
        return imdb.find_shards(path, files, splits, purpose)
    if splits:
        raise DataError(
            f"{path}: split={', '.join(splits)} is for IMDB's archive and the sample; for other "
            "files write {split} in the path in place of its name, or leave split out"
        )
    if format != "auto":
        return list(group_small_files([(format, file) for file in files], (), document))
    return list(group_small_files(_recognized(path, files, folder is not None), (), document))


def _recognized(path: str, files: list[File], is_folder: bool) -> list[tuple[str, File]]:
    """Pair files with their formats. In a folder or glob, other files (a README) are left out.

    Raises:
        DataError: no file has a known suffix.
    """
    found = [(format, file) for file in files if (format := format_of(file)) is not None]
    if found:
        return found
    if is_folder:
        raise DataError(
            f"{path}: holds no {', '.join(suffixes())} files; set format to what it holds"
        )
    raise DataError(
        f"{path}: format=auto does not know this suffix; set format to one of "
        f"{', '.join([*FORMATS, 'imdb'])}"
    )


def fingerprint(config: SourceConfig, *, labels: bool = False) -> list[list[Any]]:
    """Identify the source's content without reading it: [path, size, mtime in ns] of every file.

    The mtime is None for `sample:`, whose file is written anew when its package is installed.
    """
    return [
        [file.name, file.size, file.mtime]
        for shard in shards(config, labels=labels)
        for file in shard.files
    ]


def read(shard: Shard, config: SourceConfig, *, labels: bool = False) -> Iterator[pa.Table]:
    """Read a shard in batches of bounded size, good rows and bad ones, in a fixed order.

    Returns:
        Tables with the string columns text, label, problem and place; for a good row problem and
        place are null, for a bad one text is. `label` is null unless `labels` is set.

    Raises:
        DataError: the whole file is unreadable: cut short, a column is missing.
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
    """Read the first document of a labelled source, to find mistakes that all rows share.

    Raises:
        DataError: as `documents`, for the rows up to the first document.
    """
    one = config.model_copy(update={"limit": 1})
    next(documents(one, labels=True))


def documents(
    config: SourceConfig, *, labels: bool = False, skipped: Counter[str] | None = None
) -> Iterator[pa.Table]:
    """Read a whole source in this process, in batches of bounded size and in a fixed order.

    Args:
        config: the source.
        labels: whether every row must have a label.
        skipped: receives the number of rows left out, by problem (`on_bad_row: skip`).

    Returns:
        Tables with the string columns text and label (null unless `labels`).

    Raises:
        DataError: the first bad row (`on_bad_row: fail`), an unreadable file, no documents at all.
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
