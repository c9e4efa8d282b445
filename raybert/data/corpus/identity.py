"""Which corpus a folder holds: the configuration and the input files that it was made from."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any

from raybert.config import differences
from raybert.data.corpus.manifest import MANIFEST, Manifest
from raybert.data.corpus.settings import CorpusConfig
from raybert.data.sources.documents import fingerprint
from raybert.data.tokenizer_training import make_tokenizer
from raybert.errors import UserError
from raybert.storage.folder import Folder

_REMEDY = "name another folder, or pass --force to make this corpus again"


def existing(config: CorpusConfig, folder: Folder) -> Manifest | None:
    """Return the manifest of the corpus in `folder` if `config` describes that corpus.

    Returns:
        None where the folder holds no finished corpus.

    Raises:
        UserError: another configuration or other source files made it.
    """
    if not folder.exists(MANIFEST):
        return None
    manifest = Manifest.read(folder)
    check_config(config, manifest, folder)
    for name, was, now in _changes(manifest.info.get("inputs", {}), inputs_of(config)):
        raise UserError(f"{folder}: its corpus was made from {name} {was}, now {now}; {_REMEDY}")
    return manifest


def check_config(config: CorpusConfig, manifest: Manifest, folder: Folder) -> None:
    """Compare the configuration that made a corpus with `config`; reads no source file.

    Raises:
        UserError: they differ.
    """
    changed = differences(manifest.info.get("config", {}), config.model_dump(mode="json"))
    if changed:
        key, (old, new) = next(iter(changed.items()))
        more = f" (and {len(changed) - 1} more keys)" if len(changed) > 1 else ""
        raise UserError(
            f"{folder}: its corpus was made with corpus.{key}={old!r}, now it is {new!r}{more}; "
            f"{_REMEDY}"
        )


def inputs_of(config: CorpusConfig) -> dict[str, list[list[Any]]]:
    """Identify every file that goes into the corpus, by the key that names it.

    Returns:
        For source and overlap `sources.documents.fingerprint`, for a tokenizer file its hash.
    """
    inputs = {"source": fingerprint(config.source)}
    if config.overlap is not None:
        inputs["overlap"] = fingerprint(config.overlap)
    if config.tokenizer.kind == "file":
        inputs["tokenizer"] = [["hash", make_tokenizer(config.tokenizer, ()).hash, None]]
    return inputs


def _changes(
    old: dict[str, list[list[Any]]], new: dict[str, list[list[Any]]]
) -> Iterator[tuple[str, str, str]]:
    """Yield (file, description before, description now) for every input that differs."""
    for key in new:
        before = {name: rest for name, *rest in old.get(key, [])}
        after = {name: rest for name, *rest in new[key]}
        for name in [*before, *(name for name in after if name not in before)]:
            if before.get(name) != after.get(name):
                yield name, _describe(before.get(name)), _describe(after.get(name))


def _describe(values: list[Any] | None) -> str:
    if values is None:
        return "(not there)"
    size, mtime = values
    if isinstance(size, str):  # a tokenizer's hash
        return size[:12]
    if mtime is None:
        return f"of {size:,} bytes"
    when = datetime.datetime.fromtimestamp(mtime / 1e9, datetime.UTC)
    return f"of {size:,} bytes from {when:%Y-%m-%d %H:%M:%S} UTC"
