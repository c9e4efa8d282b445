"""How the files of a path are laid out: which reader reads which of them, with which labels.

Formats are recognized by suffix, files without one by their content. A zip archive is a folder of
its members. Other layouts are IMDB's, a folder for each class, and what `datasets` saves to a disk.
"""

from __future__ import annotations

import functools
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from raybert.data.sources import archive, datasets
from raybert.data.sources.cells import Columns
from raybert.data.sources.csv_tables import csv_columns
from raybert.data.sources.files import ZIP_ERRORS, File, Purpose, ReadOptions, Shard, open_zip
from raybert.data.sources.files import group_small_files as group
from raybert.data.sources.formats import FORMATS, format_of, suffixes
from raybert.data.sources.listing import LeftOut, list_files
from raybert.data.sources.opening import open_text
from raybert.errors import DataError, one_line, printable

_MAGIC = {"PAR1": "parquet", "ARROW1": "arrow"}
_SAVED = ("state.json", "dataset_info.json", "dataset_dict.json")  # by datasets' save_to_disk
#: What files of other programs are to be saved as.
_REMEDIES = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods", ".numbers"), "save it as CSV (UTF-8)"),
    **dict.fromkeys((".docx", ".doc", ".odt", ".rtf", ".pdf", ".html", ".htm"), "save it as text"),
    **dict.fromkeys((".rar", ".7z"), "unpack it, or pack it as zip or tar"),
    **dict.fromkeys(
        (".orc", ".avro", ".sqlite", ".db", ".pkl", ".pickle", ".h5", ".dta", ".sav"),
        "write it as Parquet or CSV",
    ),
}
_SPLITS = {"train", "test", "dev", "valid", "validation", "val", "eval", "unsup", "unsupervised"}


class Request(NamedTuple):
    """What a path is read for, and how."""

    format: str
    document: str
    splits: list[str] | None
    purpose: Purpose
    columns: Columns
    options: ReadOptions
    follow_links: bool


class Found(NamedTuple):
    """The shards of a path, and what a line about it says."""

    shards: list[Shard]
    left_out: LeftOut
    layout: str = ""  # where it is not a file or a folder of files


def find_shards(path: str, request: Request) -> Found:
    """List the files of a path and put them into shards.

    Raises:
        DataError: there are no files that can be read, or no such split.
    """
    listing = list_files(path, follow_links=request.follow_links)
    files = [inner for file in listing.files for inner in _expanded(file, request.format)]
    is_folder = listing.folder is not None or any(file.member for file in files)
    if not files:
        left = f" ({listing.left_out})" if listing.left_out.counts else ""
        raise DataError(f"{path}: no files here{left}; name a file, or a glob such as {path}/*.txt")
    if request.format == "imdb" or (request.format == "auto" and _is_imdb(files)):
        shards = datasets.imdb_shards(path, files, request.splits, request.purpose)
        return Found(shards, listing.left_out, "laid out as IMDB")
    saved = _saved_by_datasets(files) if request.format == "auto" else {}
    if saved:
        return _saved_shards(path, saved, request, listing.left_out)
    if request.splits:
        raise DataError(
            f"{path}: split={', '.join(request.splits)} is for IMDB's archive and the sample, and "
            "for folders that datasets saved; for other files write {split} in the path in place "
            "of its name, or leave split out"
        )
    if request.format != "auto":
        found = [(request.format, file) for file in files]
    else:
        found = list(_recognized(files, is_folder, request, listing.left_out))
    if not found:
        raise DataError(f"{path}: {_unknown(files, is_folder, listing.left_out)}")
    document, layout = request.document, ""
    if request.columns.label is not None and is_folder:
        found, document, layout = _label_by_folder(path, listing.folder or path, found, request)
    return Found(list(group(found, (), document, request.options)), listing.left_out, layout)


def _unknown(files: list[File], is_folder: bool, left_out: LeftOut) -> str:
    remedy = next((_REMEDIES[f.suffix] for f in files if f.suffix in _REMEDIES), None)
    if remedy is not None:
        suffixes_found = sorted({file.suffix for file in files if file.suffix in _REMEDIES})
        return f"{', '.join(suffixes_found)} is a format that is not read here; {remedy}"
    if not is_folder:
        known = ", ".join([*FORMATS, "imdb"])
        return f"format=auto does not know this suffix; set format to one of {known}"
    left = f" (left out: {left_out})" if left_out.counts else ""
    return f"holds no {', '.join(suffixes())} files{left}; set format to what it holds"


def _expanded(file: File, format: str) -> Iterator[File]:
    """A file, or the files in a zip archive."""
    if not file.path.lower().endswith(".zip"):
        yield file
        return
    try:
        members = open_zip(file).infolist()
    except ZIP_ERRORS as error:
        raise DataError(
            f"{file.name} is no zip archive, or is cut short: {one_line(error)}"
        ) from None
    for member in members:
        is_hidden = any(part.startswith((".", "_")) for part in member.filename.split("/"))
        is_file = bool(member.filename) and not member.is_dir()
        if is_file and not is_hidden:
            yield replace(
                file,
                name=f"{file.name}/{printable(member.filename)}",
                size=member.file_size,
                member=member.filename,
            )


def _recognized(
    files: list[File], is_folder: bool, request: Request, left_out: LeftOut
) -> Iterator[tuple[str, File]]:
    """Pair files with their formats; others (a README) are counted in `left_out`."""
    by_suffix = [(file, _format_by_name(file)) for file in files]
    known = Counter(format for _, format in by_suffix if format is not None)
    example = next((file for file, format in by_suffix if format == "csv"), None)
    for file, format in by_suffix:
        if format is None and not file.suffix:
            usual = next(iter(known)) if len(known) == 1 else None
            format = _format_by_content(file, is_folder, usual, example, request)
        if format is not None:
            yield format, file
        elif is_folder:
            suffix = f"{file.suffix} files" if file.suffix else "files without a suffix"
            left_out.add(suffix, file.name)


def _format_by_name(file: File) -> str | None:
    return "tar" if datasets.is_archive(file) else format_of(file)


def _format_by_content(
    file: File, is_folder: bool, usual: str | None, example: File | None, request: Request
) -> str | None:
    """The format of a file without a suffix: what it begins with, and what is beside it."""
    try:
        opened = open_text(file, request.options.encoding)
    except DataError:
        return None
    opened.stream.close()
    head = opened.head.lstrip()
    magic = next((name for mark, name in _MAGIC.items() if head.startswith(mark)), None)
    if magic is not None or "\0" in head:
        return magic
    if head.startswith(("{", "[")):
        return "jsonl"
    names = csv_columns(file, request.options, request.columns)
    if example is not None:
        return "csv" if names == csv_columns(example, request.options, request.columns) else None
    if request.columns.text in names:
        return "csv"
    # part-0003 and 10456 are texts, README and LICENSE are not.
    is_numbered = any(character.isdigit() for character in posixpath.basename(file.path))
    is_text = not is_folder or (is_numbered and usual in (None, "text"))
    return "text" if is_text and head else None


def _label_by_folder(
    path: str, folder: str, found: list[tuple[str, File]], request: Request
) -> tuple[list[tuple[str, File]], str, str]:
    """Give texts their folder's name as a label, where each class has a folder.

    A document is then a file, unless each class has only one.
    """
    root = folder.partition("?")[0].rstrip("/") if "://" in folder else folder.rstrip("/")
    relative = {file: file.name[len(root) :].lstrip("/") for _, file in found}
    if any(name != "text" or "/" not in relative[file] for name, file in found):
        return found, request.document, ""
    above = posixpath.commonpath({posixpath.dirname(name) for name in relative.values()})
    if above and above not in {posixpath.dirname(name) for name in relative.values()}:
        relative = {file: name[len(above) + 1 :] for file, name in relative.items()}
    sizes = Counter(relative[file].split("/")[0] for _, file in found)
    splits = sorted(_SPLITS & {name.lower() for name in sizes})
    if splits:
        raise DataError(
            f"{path}: its folders are splits ({', '.join(sizes)}), not classes; name one of them "
            "in path"
        )
    named = [(n, replace(file, label=relative[file].split("/")[0])) for n, file in found]
    is_file = request.format == "auto" and max(sizes.values()) > 1
    document = "file" if is_file else request.document
    return (
        named,
        document,
        f"labels are the names of {len(sizes):,} folders, a document a {document}",
    )


def _is_imdb(files: list[File]) -> bool:
    """Whether there is a review by its path, in a folder or in an archive."""
    if any(datasets.split_and_label(file.path) for file in files):
        return True
    return all(map(datasets.is_archive, files)) and any(_holds_imdb(file) for file in files)


_PEEKED_MEMBERS, _PEEKED_BYTES = 1000, 64 << 20


@functools.lru_cache(maxsize=64)
def _holds_imdb(file: File) -> bool:
    """Whether an archive's first members have a review among them; also one that can't be read."""
    size = 0
    with file.open_stream() as stream:
        for number, member in enumerate(archive.members(stream, file.name)):
            if datasets.split_and_label(member.path):
                return True
            size += member.size
            if number >= _PEEKED_MEMBERS or size >= _PEEKED_BYTES:
                break
    return False


def _saved_by_datasets(files: list[File]) -> Mapping[str, list[File]]:
    """The Arrow files of each folder that `datasets` saved, by the folder's name."""
    folders = {posixpath.dirname(f.name) for f in files if f.name.endswith(f"/{_SAVED[0]}")}
    folders &= {posixpath.dirname(f.name) for f in files if f.name.endswith(f"/{_SAVED[1]}")}
    found: dict[str, list[File]] = {}
    for file in files:
        folder = posixpath.dirname(file.name)
        if folder in folders and file.suffix == ".arrow":
            found.setdefault(folder, []).append(file)
    return found


def _saved_shards(
    path: str, saved: Mapping[str, list[File]], request: Request, left_out: LeftOut
) -> Found:
    if len(saved) == 1 and not request.splits:
        chosen = next(iter(saved.values()))
    else:
        by_split = {posixpath.basename(folder): files for folder, files in saved.items()}
        wanted = datasets.wanted_splits(path, request.splits, request.purpose, tuple(by_split))
        if not wanted:
            raise DataError(
                f"{path}: set split to one of {', '.join(by_split)}; none of them is the usual one"
            )
        chosen = [file for split in wanted for file in by_split[split]]
    shards = group([("arrow", file) for file in chosen], (), request.document, request.options)
    return Found(list(shards), left_out, "saved by datasets")
