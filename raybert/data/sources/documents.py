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
from raybert.data.sources.cells import Columns
from raybert.data.sources.files import File, Purpose, Row, Shard
from raybert.data.sources.formats import FORMATS, reader_of
from raybert.data.sources.holding_out import is_read
from raybert.data.sources.layouts import Found, Request, find_shards
from raybert.data.sources.listing import LeftOut
from raybert.data.sources.row_table import LabelParser, RowTable, accept, first_good
from raybert.data.sources.sampling import Sampler, chosen_rows
from raybert.data.sources.settings import SourceConfig
from raybert.errors import DataError

_TYPED_FILES = 100  # whose types are looked up, at most


def shards(config: SourceConfig, *, labels: bool = False) -> list[Shard]:
    """List the shards of a source, in the order of its documents.

    `labels` and the source's class decide the default split. A DataError for a missing file or an
    unknown format or split; a UserError for `sample:` without its package.
    """
    return [shard for _, found in _find(config, labels) for shard in found.shards]


def _find(config: SourceConfig, labels: bool) -> Iterator[tuple[str, Found]]:
    """Yield each path and what it holds."""
    if config.path is None:
        raise DataError("a source has no path: name its texts, or sample:imdb")
    purpose: Purpose = "train" if labels else "corpus"
    if config.is_for_evaluation:
        purpose = "evaluate"
    request = Request(
        config.format,
        config.document,
        config.splits,
        purpose,
        _columns(config, labels),
        config.read_options,
        config.follow_links,
    )
    for path in config.paths:
        if path.startswith("sample:"):
            shard = datasets.sample_shard(path, config.splits, purpose)
            yield path, Found([shard], LeftOut())
        elif "{split}" in path:
            if not config.splits:
                raise DataError(f"{path}: set split to the names that replace {{split}}")
            for split in config.splits:
                expanded = path.replace("{split}", split)
                yield expanded, find_shards(expanded, request._replace(splits=None))
        else:
            yield path, find_shards(path, request)


def describe(config: SourceConfig, *, labels: bool = False) -> list[str]:
    """A line for each path: what was found there, how it is written, and what is left out.

    Raises:
        DataError: as `shards`, and if a file can't be read.
    """
    columns, lines = _columns(config, labels), []
    for path, found in _find(config, labels):
        if path.startswith("sample:"):
            continue
        by_reader: dict[str, list[File]] = {}
        for shard in found.shards:
            by_reader.setdefault(shard.reader, []).extend(shard.files)
        parts = []
        for reader, files in by_reader.items():
            parts.append(f"{len(files):,} {reader} file" + ("s" if len(files) > 1 else ""))
            detail = FORMATS[reader].describe if reader in FORMATS else None
            if detail is not None:
                more = " in the first one" if len(files) > 1 else ""
                parts[-1] += f" ({detail(files[0], config.read_options, columns)}{more})"
        text = f"{path}: {', '.join(parts)}" + (f"; {found.layout}" if found.layout else "")
        lines.append(text + (f"; left out: {found.left_out}" if found.left_out.counts else ""))
    return lines


def fingerprint(config: SourceConfig, *, labels: bool = False) -> list[list[Any]]:
    """Identify the source's content without reading it: [path, size, mtime in ns] of every file."""
    return [
        [file.name, file.size, file.mtime]
        for shard in shards(config, labels=labels)
        for file in shard.files
    ]


def sampled_shards(
    config: SourceConfig, *, labels: LabelParser | None = None, skipped: Counter[str]
) -> list[Shard]:
    """The shards of a source, with the rows to read where `limit` asks for a sample.

    That reads the source once; bad rows raise, or are counted in `skipped`, as in `documents`.
    """
    found = shards(config, labels=labels is not None)
    if config.limit is None or config.sample == "first":
        return found
    sampler, counted = Sampler(config.limit, config.sample_seed), Counter[str]()
    for index, shard in enumerate(found):
        row = 0
        for table in read(shard, config, labels=labels):
            accept(table, config.on_bad_row, counted)
            sampler.add(table, index, row)
            row += table.num_rows
    chosen = sampler.choose(found)
    if any(shard.rows is not None for shard in chosen):
        skipped.update(counted)
    return chosen


def read(
    shard: Shard, config: SourceConfig, *, labels: LabelParser | None = None
) -> Iterator[pa.Table]:
    """Read a shard in batches of bounded size, good rows and bad ones, in a fixed order.

    The columns are those of `schema_of`; `label` is null where no labels are wanted. A DataError if
    the file is cut short or lacks a column.
    """
    table = RowTable(config, labels)
    first = config.limit if config.sample == "first" else None
    good = 0
    for file, row in _chosen(shard, config, labels is not None):
        good += table.add(row, file.name)
        if table.is_full:
            yield table.flush()
        if good == first:  # no shard has to give more than the limit of the whole source
            break
    if len(table):
        yield table.flush()


def _chosen(shard: Shard, config: SourceConfig, labels: bool) -> Iterator[tuple[File, Row]]:
    """The rows of a shard that belong to the sample, or all."""
    rows, chosen = _rows(shard, config, labels), chosen_rows(shard)
    if chosen is None:
        yield from rows
        return
    wanted = next(chosen, None)
    for number, row in enumerate(rows):
        if wanted is None:
            return
        if number == wanted:
            yield row
            wanted = next(chosen, None)


def _columns(config: SourceConfig, labels: bool) -> Columns:
    given = config.label_column
    label = given if isinstance(given, str) else tuple(given)
    kept = tuple(config.keep_columns)
    return Columns(config.text_column, label if labels else None, config.other_columns, kept)


def _rows(shard: Shard, config: SourceConfig, labels: bool) -> Iterator[tuple[File, Row]]:
    columns, reader = _columns(config, labels), reader_of(shard.reader)
    rows = ((file, row) for file in shard.files for row in reader(file, shard, columns))
    return rows if not config.hold_out else ((f, row) for f, row in rows if is_read(row, config))


def raw_rows(config: SourceConfig, count: int, *, labels: bool = True) -> list[Row]:
    """The first rows of a source as they are in the files, unchecked; by default with labels."""
    found = shards(config, labels=labels)
    rows = (row for shard in found for _, row in _rows(shard, config, labels))
    return list(itertools.islice(rows, count))


def column_names(config: SourceConfig, *, labels: bool = True) -> list[str]:
    """The columns of a source's first file; empty for formats without columns."""
    shard = shards(config, labels=labels)[0]
    find = FORMATS[shard.reader].columns if shard.reader in FORMATS else None
    return (
        [] if find is None else find(shard.files[0], config.read_options, _columns(config, labels))
    )


def partition_names(config: SourceConfig) -> set[str]:
    """The columns that the paths of the files have."""
    return {n for shard in shards(config) for file in shard.files for n in file.partition}


def column_types(config: SourceConfig) -> dict[str, pa.DataType]:
    """The types of the columns that are the same in all files, where formats have them."""
    files = [(shard.reader, file) for shard in shards(config) for file in shard.files]
    if len(files) > _TYPED_FILES:
        return {}
    found: dict[str, pa.DataType] | None = None
    for reader, file in files:
        find = FORMATS[reader].types if reader in FORMATS else None
        types = {} if find is None else find(file)
        known = types if found is None else found
        found = {name: kind for name, kind in known.items() if types.get(name) == kind}
    return found or {}


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
    for shard in sampled_shards(config, labels=labels, skipped=skipped):
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
    what = f"no documents (skipped: {counts})" if counts else "no documents"
    if config.hold_out:
        share = "none" if config.is_for_evaluation else "all"
        what += (
            f": hold_out={config.hold_out:g} sets {share} of the texts apart for evaluation; give "
            "more texts, or name evaluate.source.path and leave it out"
        )
    return DataError(f"{', '.join(config.paths)}: {what}")
