"""List the files of a path, a folder, a glob or a URI, and count what is left out.

A glob is followed name by name: only folders that match so far are listed, and each directory once,
however many links lead to it. `fsspec` translates the names' wildcards; its `glob` is not used,
because it lists every folder below the first wildcard, follows links in circles, leaves out folders
that can't be read without a word, and returns times in microseconds, while a corpus stores its
sources' modification times in nanoseconds and compares them. On an object store the names below
`**` come from one recursive request.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
from fsspec.utils import glob_translate

from raybert.data.sources.files import File
from raybert.errors import DataError, one_line
from raybert.storage.folder import Folder
from raybert.storage.missing import near_names

# `**` as a part of a name, which fsspec does not accept: `a**b` is `a*b` or `a*/**/*b`.
_PARTIAL_DOUBLE_STAR = re.compile(r"(?<=[^/*])\*\*|\*\*(?=[^/*])")


@dataclass
class LeftOut:
    """Files and folders that are not read, by the reason: how many, and the first one's name."""

    counts: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count what is not read."""
        before, first = self.counts.get(reason, (0, name))
        self.counts[reason] = (before + count, first)

    def __str__(self) -> str:
        found = []
        for reason, (count, first) in sorted(self.counts.items()):
            more = f" and {count - 1:,} more" if count > 1 else ""
            found.append(f"{reason}: {first}{more}")
        return "; ".join(found)


class Listing(NamedTuple):
    """What a path holds."""

    files: list[File]  # sorted by address
    folder: str | None  # that holds them; None: the path is one file
    left_out: LeftOut


def list_files(path: str, *, follow_links: bool = False) -> Listing:
    """List the files of a configured path.

    Names that begin with a dot or an underscore are left out, unless the pattern begins with it.
    Wildcards are `*`, `?`, `[...]`, and `**` for folders at any depth; a name that exists as it
    stands is no pattern, and `[*]` is a star itself. A local link out of the folder is followed
    with `follow_links` only.

    Raises:
        DataError: nothing is there, a glob matches nothing, a link leads out of the folder, or the
            storage can't be listed.
    """
    is_uri = "://" in path
    wildcards = "*[" if is_uri else "*?["  # in a URI, ? begins the query
    is_glob = any(character in path for character in wildcards)
    if not (is_uri and is_glob):  # a local file may have brackets in its name
        folder = Folder(path)
        info = _info(folder, path)
        if info.type == pafs.FileType.File:
            return Listing([File(path, folder.uri, info.size, info.mtime_ns)], None, LeftOut())
        if info.type == pafs.FileType.Directory:
            return _list(folder, path, ["**"], follow_links)
        if info.type == pafs.FileType.Unknown:
            raise DataError(f"{path}: no regular file or folder; write its content to a file")
    if not is_glob:
        if os.path.islink(os.path.expanduser(path)):
            raise DataError(f"{path}: a link to nothing; name a file or a folder")
        raise DataError(f"{path}: no such file or folder{near_names(path)}")
    base, pattern = _split_glob(path, wildcards)
    folder = Folder(base or ".")
    if _info(folder, base).type != pafs.FileType.Directory:
        raise DataError(f"{path}: no such folder: {base}{near_names(base)}")
    listing = _list(folder, base, pattern.split("/"), follow_links)
    if not listing.files:
        left = f" that can be read ({listing.left_out})" if listing.left_out.counts else ""
        raise DataError(
            f"{path}: no file matches{left}; write [*], [?] and [[] for these signs themselves"
        )
    return listing


def _list(folder: Folder, shown: str, parts: Sequence[str], follow_links: bool) -> Listing:
    """List the files below a folder that match the parts of a pattern, named after `shown`."""
    left_out = LeftOut()
    found: Iterable[File]
    if folder.is_local:
        found = _LocalWalk(folder, shown, follow_links, left_out).files(parts)
    else:
        found = _remote_files(folder, shown, parts)
    unique = {file.uri: file for file in found}
    return Listing([unique[uri] for uri in sorted(unique)], shown, left_out)


def _spellings(parts: Sequence[str]) -> set[tuple[str, ...]]:
    """The patterns without `**` inside of a name that match the same as `parts`."""
    pattern = "/".join(parts)
    found = {_PARTIAL_DOUBLE_STAR.sub(stars, pattern) for stars in ("*", "*/**/*")}
    return {_without_repeats(spelling.split("/")) for spelling in found}


def _without_repeats(parts: Sequence[str]) -> tuple[str, ...]:
    """Parts with one `**` for several in a row, and a name after the last one."""
    kept = [p for i, p in enumerate(parts) if p and not (p == "**" == parts[i - 1] and i)]
    return (*kept, "*") if kept[-1] == "**" else tuple(kept)


def _name_matcher(part: str) -> Callable[[str], bool]:
    """A function that says whether a name matches a part of a pattern."""
    expression = re.compile(glob_translate(part))
    may_be_hidden = part[:1] if part.startswith((".", "_")) else None

    def matches(name: str) -> bool:
        is_hidden = name.startswith((".", "_")) and name[0] != may_be_hidden
        return not is_hidden and expression.fullmatch(name) is not None

    return matches


_ANY_NAME = _name_matcher("*")


class _LocalWalk:
    """Walks a local folder: each directory once, and each file once, by their inodes."""

    def __init__(self, folder: Folder, shown: str, follow_links: bool, left_out: LeftOut) -> None:
        self._root, self._shown = folder.path, shown  # the root has no links in it
        self._follow_links, self._left_out = follow_links, left_out

    def files(self, parts: Sequence[str]) -> list[File]:
        """The files that match; of a file and links to it, the file."""
        found = {
            entry.path: (is_linked, entry)
            for spelling in _spellings(parts)
            for is_linked, entry in self._walk(spelling)
        }
        files: dict[tuple[int, int], File] = {}
        for path, (is_linked, entry) in sorted(found.items(), key=lambda f: (f[1][0], f[0])):
            info = entry.stat()
            inode = (info.st_dev, info.st_ino)
            if is_linked and inode in files:
                self._left_out.add("links to files that are read", self._name(path))
                continue
            uri = os.path.realpath(path) if is_linked else path
            # A hard link is a file of its own: nothing says which of the names is the right one.
            key = inode if inode not in files else (-1, len(files))
            files[key] = File(self._name(path), uri, info.st_size, info.st_mtime_ns)
        return list(files.values())

    def _name(self, path: str) -> str:
        relative = path[len(self._root) :].lstrip("/")
        return f"{self._shown.rstrip('/')}/{relative}" if self._shown else relative

    def _walk(self, parts: tuple[str, ...]) -> Iterator[tuple[bool, os.DirEntry[str]]]:
        """Yield the files that match, and whether a link led there."""
        seen: set[tuple[int, int, tuple[str, ...]]] = set()
        waiting = [(self._root, parts, False)]
        while waiting:
            directory, left, is_linked = waiting.pop()
            try:
                info = os.stat(directory)
                if (info.st_dev, info.st_ino, left) in seen:
                    continue
                seen.add((info.st_dev, info.st_ino, left))
                with os.scandir(directory) as scan:
                    children = sorted(scan, key=lambda entry: entry.name, reverse=True)
            except OSError as error:
                if directory == self._root:
                    raise DataError(f"{self._shown}: can't be read: {one_line(error)}") from None
                self._left_out.add("folders that can't be read", self._name(directory))
                continue
            is_deep = left[0] == "**"
            matches = _name_matcher(left[is_deep])
            rest = left[is_deep + 1 :]
            later = []
            for child in children:
                is_match, is_below = matches(child.name), is_deep and _ANY_NAME(child.name)
                if not is_match and not is_below:
                    continue
                kind = self._kind(child)
                linked = is_linked or child.is_symlink()
                if kind == "directory":
                    tails = [rest] * bool(rest and is_match) + [left] * is_below
                    if tails and self._may_follow(child):
                        later += [(child.path, tail, linked) for tail in tails]
                elif rest or not is_match:
                    continue
                elif kind != "file":
                    self._left_out.add(kind, self._name(child.path))
                elif self._may_follow(child):
                    yield linked, child
            # Links first, so that they are taken last: by then their targets may be known.
            waiting += sorted(later, key=lambda found: not found[2])

    def _kind(self, entry: os.DirEntry[str]) -> str:
        """`file`, `directory`, or the reason why it is left out."""
        try:
            entry.name.encode()
            mode = entry.stat().st_mode
        except UnicodeEncodeError:
            return "names that are not UTF-8"
        except OSError:
            return "links to nothing" if entry.is_symlink() else "files that can't be read"
        if stat.S_ISDIR(mode):
            return "directory"
        return "file" if stat.S_ISREG(mode) else "no regular files"

    def _may_follow(self, entry: os.DirEntry[str]) -> bool:
        """Whether an entry may be read; a DataError for a link out of the folder."""
        if not entry.is_symlink() or self._follow_links:
            return True
        target = os.path.realpath(entry.path)
        if os.path.commonpath([target, self._root]) == self._root:
            return True
        raise DataError(
            f"{self._name(entry.path)}: a link to {target}, outside of {self._shown or '.'}; "
            "remove it, name its target in path, or set follow_links: true"
        )


def _remote_files(folder: Folder, shown: str, parts: Sequence[str]) -> Iterator[File]:
    """Files of an object store, or of another remote filesystem."""
    shown = shown.partition("?")[0] if "://" in shown else shown
    for spelling in _spellings(parts):
        for relative, info in _remote_infos(folder, shown, spelling):
            name = f"{shown.rstrip('/')}/{relative}" if shown else relative
            yield File(name, (folder / relative).uri, info.size, info.mtime_ns)


def _remote_infos(folder: Folder, shown: str, parts: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    waiting = [("", parts)]
    while waiting:
        prefix, left = waiting.pop()
        is_deep = left[0] == "**"
        selector = pafs.FileSelector(
            folder.join(prefix) if prefix else folder.path, recursive=is_deep
        )
        matches = _path_matcher(left) if is_deep else _name_matcher(left[0])
        for info in _info(folder, shown, selector):
            below = info.path[len(selector.base_dir) :].lstrip("/")
            relative = f"{prefix}/{below}" if prefix else below
            if not matches(below):
                continue
            if info.type == pafs.FileType.File and (is_deep or len(left) == 1):
                yield relative, info
            elif info.type == pafs.FileType.Directory and not is_deep and len(left) > 1:
                waiting.append((relative, left[1:]))


def _path_matcher(parts: tuple[str, ...]) -> Callable[[str], bool]:
    expression = re.compile(glob_translate("/".join(parts)))
    last = _name_matcher(parts[-1])

    def matches(path: str) -> bool:
        *above, name = path.split("/")
        is_hidden = any(part.startswith((".", "_")) and part not in parts for part in above)
        return not is_hidden and last(name) and expression.fullmatch(path) is not None

    return matches


def _info(folder: Folder, shown: str, selector: pafs.FileSelector | None = None) -> Any:
    """The information about a folder, or on the files that a selector selects."""
    try:
        return folder.filesystem.get_file_info(selector or folder.path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{shown}: can't be read: {one_line(error)}") from None
    except Exception as error:  # a filesystem of another library, as of hf://, has its own errors
        if folder.is_local:
            raise
        raise DataError(f"{shown}: can't be read: {one_line(error)}") from None


def _split_glob(path: str, wildcards: str) -> tuple[str, str]:
    """Split a glob into the folder before its first pattern and the pattern from there on.

    A local folder that exists under a name with wildcards is no pattern.
    """
    query = ""
    if "://" in path:
        path, mark, rest = path.partition("?")
        query = mark + rest
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if any(c in part for c in wildcards))
    while "://" not in path and first < len(parts) - 1:
        literal = os.path.expanduser("/".join(parts[: first + 1]))
        if not os.path.isdir(literal):
            break
        later = (
            i for i, part in enumerate(parts) if i > first and any(c in part for c in wildcards)
        )
        first = next(later, len(parts) - 1)
    base = "/".join(parts[:first])
    return (base + "/" if first else "") + query, "/".join(parts[first:])
