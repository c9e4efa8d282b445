"""List the files of a path, a folder, a glob or a URI, in the order of their addresses.

One recursive request of pyarrow lists a folder, and fsspec translates the glob. fsspec's own `glob`
over `ArrowFSWrapper` is not used: it sends one request per folder (201 for 20,000 files in 200
folders, in 0.27 s of CPU rather than 0.05 s), and it returns times in microseconds, while a corpus
stores its sources' modification times in nanoseconds and compares them.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pyarrow as pa
import pyarrow.fs as pafs
from fsspec.utils import glob_translate

from raybert.data.sources.shard import File, error_text
from raybert.errors import DataError
from raybert.storage.folder import Folder

# `**` as a part of a name, which fsspec does not accept: `a**b` is `a*b` or `a*/**/*b`.
_PARTIAL_DOUBLE_STAR = re.compile(r"(?<=[^/*])\*\*|\*\*(?=[^/*])")


def list_files(path: str) -> tuple[list[File], str | None]:
    """List the files of a configured path.

    Files and folders whose name begins with a dot or an underscore are left out.

    Returns:
        The files, and the folder that they were found in, None where the path names one file.

    Raises:
        DataError: nothing is there, a glob matches nothing, or the storage can't be listed.
    """
    is_uri = "://" in path
    wildcards = "*[" if is_uri else "*?["  # in a URI, ? begins the query
    is_glob = any(character in path for character in wildcards)
    if not (is_uri and is_glob):  # a local file may have brackets in its name
        folder = Folder(path)
        info = _info(folder, path)
        if info.type == pafs.FileType.File:
            return [_file(path, folder.uri, info)], None
        if info.type == pafs.FileType.Directory:
            return _walk(folder, path, lambda relative: True), path
    if not is_glob:
        raise DataError(f"{path}: no such file or folder")
    base, pattern = _split_glob(path, wildcards)
    folder = Folder(base or ".")
    if _info(folder, base).type != pafs.FileType.Directory:
        raise DataError(f"{path}: no such folder: {base}")
    found = _walk(folder, base, _matcher(pattern))
    if not found:
        raise DataError(f"{path}: no file matches")
    return found, base


def _walk(folder: Folder, shown: str, matches: Callable[[str], bool]) -> list[File]:
    """List the files below a folder whose path from there matches, named after `shown`."""
    selector = pafs.FileSelector(folder.path, recursive=True)
    try:
        infos = folder.filesystem.get_file_info(selector)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{shown}: can't be listed: {error_text(error)}") from None
    shown = shown.partition("?")[0] if "://" in shown else shown
    found = []
    for info in infos:
        if info.type != pafs.FileType.File:
            continue
        relative = info.path[len(folder.path) :].lstrip("/")
        is_hidden = any(part.startswith((".", "_")) for part in relative.split("/"))
        if not is_hidden and matches(relative):
            name = f"{shown.rstrip('/')}/{relative}" if shown else relative
            found.append(_file(name, (folder / relative).uri, info))
    return sorted(found, key=lambda file: file.uri)


def _info(folder: Folder, shown: str) -> pafs.FileInfo:
    try:
        return folder.filesystem.get_file_info(folder.path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{shown}: can't be read: {error_text(error)}") from None


def _file(name: str, uri: str, info: pafs.FileInfo) -> File:
    return File(name, uri, int(info.size), info.mtime_ns)


def _split_glob(path: str, wildcards: str) -> tuple[str, str]:
    """Split a glob into the folder before the first wildcard and the pattern from there on."""
    at = min(path.index(c) for c in wildcards if c in path)
    slash = path.rfind("/", 0, at) + 1
    query = ""
    if "://" in path:
        path, mark, rest = path.partition("?")
        query = mark + rest
    return path[:slash] + query, path[slash:]


def _matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a path matches a glob: `*` and `?` match inside a name, `**` crosses folders."""
    spellings = {_PARTIAL_DOUBLE_STAR.sub(stars, pattern) for stars in ("*", "*/**/*")}
    expressions = [re.compile(glob_translate(spelling)) for spelling in spellings]
    return lambda path: any(expression.fullmatch(path) for expression in expressions)
