"""IMDB's review data set, `aclImdb`: an archive, or the folder that it unpacks to.

A review is a file such as `train/pos/0_9.txt`, whose path holds its split and its label.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from raybert.data.sources import archive
from raybert.data.sources.shard import Columns, File, Purpose, Row, Shard, group_small_files
from raybert.errors import DataError

SPLITS = ("train", "unsup", "test")
_DEFAULT_SPLITS: dict[Purpose, tuple[str, ...]] = {
    "corpus": ("train", "unsup"), "train": ("train",), "evaluate": ("test",),
}  # fmt: skip
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.zst")
_MEMBER = re.compile(r"(?:^|/)(train|test)/(pos|neg|unsup)/[^/]+\.txt$")


def split_and_label(path: str, splits: tuple[str, ...] = SPLITS) -> tuple[str, str | None] | None:
    """Parse (split, label) from a review's path; None for other paths and for other splits."""
    match = _MEMBER.search(path)
    if match is None:
        return None
    split, label = match.groups()
    if label == "unsup":
        split, label = "unsup", None
    return (split, label) if split in splits else None


def is_imdb(files: list[File]) -> bool:
    """Whether files are archives only, or hold a review by their path."""
    return all(map(_is_archive, files)) or any(split_and_label(file.path) for file in files)


def find_shards(
    path: str, files: list[File], splits: list[str] | None, purpose: Purpose
) -> list[Shard]:
    """Put the archives and reviews among `files` into shards.

    Raises:
        DataError: the data set has no such split, or no review of the splits is there.
    """
    unknown = [split for split in splits or () if split not in SPLITS]
    if unknown:
        raise DataError(f"{path}: no split {unknown[0]!r}; there are {', '.join(SPLITS)}")
    wanted = tuple(splits or _DEFAULT_SPLITS[purpose])
    archives = [Shard("imdb-archive", (f,), wanted) for f in files if _is_archive(f)]
    reviews = [
        ("imdb-file", f) for f in files if not _is_archive(f) and split_and_label(f.path, wanted)
    ]
    if not archives and not reviews:
        raise DataError(
            f"{path}: no {' or '.join(wanted)} reviews here; expected aclImdb's layout, such as "
            "train/pos/0_9.txt"
        )
    return [*archives, *group_small_files(reviews, wanted, "file")]


def read_archive(file: File, shard: Shard, columns: Columns) -> Iterator[Row]:
    """Read the reviews of the shard's splits from a tar file, in the order of the archive."""
    with file.open_stream() as stream:
        for path, content in archive.members(stream, file.name):
            found = split_and_label(path, shard.splits)
            if found is not None:
                yield Row(content, found[1], path)


def read_file(file: File, shard: Shard, columns: Columns) -> Iterator[Row]:
    """Read one review that is a file of its own."""
    found = split_and_label(file.path, shard.splits)
    with file.open_stream() as stream:
        content = archive.read_all(stream, file.name)
    yield Row(content, found[1] if found else None)


def _is_archive(file: File) -> bool:
    return file.path.lower().endswith(_ARCHIVES)
