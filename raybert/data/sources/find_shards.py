"""From a configured path to the shards to read: formats by suffix, IMDB's layout, the sample.

The shards are in the order of the configuration, then of the files' addresses.
"""

from __future__ import annotations

from raybert.data.sources import imdb, sample
from raybert.data.sources.formats import FORMATS, format_of, suffixes
from raybert.data.sources.listing import list_files
from raybert.data.sources.shard import File, Purpose, Shard, group_small_files
from raybert.errors import DataError


def find_shards(
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
        return [s for p in expanded for s in find_shards(p, format, document, None, purpose)]
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
