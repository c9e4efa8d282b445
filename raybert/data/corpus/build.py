"""Build a corpus: text in, tokenized rows in Parquet parts out.

`tokenize_job` reads and tokenizes on any CPU of the cluster; this process receives its tables in
the order of the source, and `corpus_writer` splits, packs and writes them. So the bytes are the
same for any number of CPUs. The manifest is written last: a folder without one holds no corpus. Of
two builds in one folder, the one that began last finishes (`attempts`).
"""

from __future__ import annotations

import datetime
import importlib.metadata
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from raybert.config import build as build_settings
from raybert.config import differences
from raybert.data.corpus.attempts import Attempt
from raybert.data.corpus.corpus_writer import CorpusWriter, DigestSet
from raybert.data.corpus.manifest import FORMAT_VERSION, MANIFEST, Manifest
from raybert.data.corpus.parts import check_row_groups
from raybert.data.corpus.settings import CorpusConfig
from raybert.data.corpus.tokenize_job import tokenized_blocks
from raybert.data.keyed import text_digest
from raybert.data.sources.changes import changes
from raybert.data.sources.documents import documents, fingerprint
from raybert.data.tokenizer import Tokenizer
from raybert.data.tokenizer_training import TrainedTokenizer, make_tokenizer, train_tokenizer
from raybert.data.unknown import check_unknown
from raybert.errors import ConfigError, UserError, damaged_file, printable
from raybert.storage.folder import Folder


@dataclass(frozen=True)
class Progress:
    """The progress of a build."""

    stage: Literal["tokenizer", "corpus"]
    documents: int
    tokens: int
    total_documents: int | None  # None where it is not known
    seconds: float  # since the stage began


def build(
    config: CorpusConfig,
    folder: Folder,
    *,
    progress: Callable[[Progress], None] = lambda progress: None,
    force: bool = False,
) -> Manifest:
    """Make a corpus in `folder` unless it is there or `force` is set; Ray must be initialized.

    `progress` is called after every block. The files of an unfinished build are deleted. Superseded
    if another build in this folder begins meanwhile.
    """
    manifest = None if force else existing(config, folder)
    if manifest is not None:
        return manifest
    began = time.monotonic()
    inputs = inputs_of(config)
    check_row_groups(config.rows_per_part, config.rows_per_group)
    if config.tokenizer.kind == "file":  # before anything is read
        _check_tokenizer(make_tokenizer(config.tokenizer, ()))
    overlap = _overlap_digests(config)
    trained, total = _train_tokenizer(config, progress)
    warn_of_unknown(config, trained.unknown)
    tokenizer = trained.tokenizer
    attempt = Attempt(folder)  # after training a tokenizer has read the source without error
    attempt.delete_leftovers()
    writer = CorpusWriter(config, folder, tokenizer, overlap, attempt)
    started = time.monotonic()
    for block in tokenized_blocks(config, tokenizer, writer.skipped):
        writer.add(block)
        seconds = time.monotonic() - started
        progress(Progress("corpus", writer.documents_read, writer.tokens, total, seconds))
        if writer.is_full:
            break
    splits, info = writer.close()
    warn_of_unknown(config, info["unknown"])
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        seq_len=config.seq_len,
        dtype=tokenizer.dtype.name,
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.hash,
        splits=splits,
        info={
            "config": config.model_dump(mode="json"),
            "inputs": inputs,
            **info,
            "tokenizer_kind": trained.kind,
            "seed": config.seed,
            "seconds": round(time.monotonic() - began, 1),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("raybert", "ray", "tokenizers", "pyarrow")
            },
        },
    )
    attempt.commit(tokenizer, manifest)
    return manifest


def _check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise for a tokenizer without the tokens that packing and masking need."""
    _ = tokenizer.pad_id, tokenizer.mask_id
    ids = tokenizer.encode([""]).values
    if len(ids) < 2:
        raise UserError(
            f"{tokenizer.name}: the tokenizer sets no tokens before and after a text, so documents "
            "in a row could not be separated; give it a template such as [CLS] $A [SEP]"
        )


def _train_tokenizer(
    config: CorpusConfig, progress: Callable[[Progress], None]
) -> tuple[TrainedTokenizer, int | None]:
    """The tokenizer, and the number of documents, which only training one counts."""
    if config.tokenizer.kind == "file" and not config.tokenizer.new_words:
        return train_tokenizer(config.tokenizer, ()), None
    count = 0
    began = time.monotonic()

    def texts() -> Iterator[str]:
        nonlocal count
        for table in documents(config.source):
            yield from table.column("text").to_pylist()
            count += table.num_rows
            progress(Progress("tokenizer", count, 0, None, time.monotonic() - began))

    trained = train_tokenizer(config.tokenizer, texts())
    return trained, count


def warn_of_unknown(config: CorpusConfig, share: float | None) -> str | None:
    """A warning if the tokenizer can't express much of the text; a DataError if it is too much."""
    kind, size = config.tokenizer.kind, config.tokenizer.vocab_size
    remedy = f"set corpus.tokenizer.kind=byte_bpe (now {kind})"
    if kind != "file":
        remedy += f", or raise corpus.tokenizer.vocab_size={size}"
    return check_unknown(share, ", ".join(config.source.paths), remedy)


def _overlap_digests(config: CorpusConfig) -> DigestSet | None:
    if config.overlap is None:
        return None
    digests = DigestSet()
    for table in documents(config.overlap):
        texts = table.column("text").to_pylist()
        words = np.frombuffer(b"".join(text_digest(t, config.seed) for t in texts), np.uint64)
        digests.add(words[::2])  # the first 64 of 128 bits, as in `tokenize_job.tokenize`
    return digests


_SHOWN_CHARS = 300  # of a value in a message
_AUTOMATIC = {"wordpiece", "byte_bpe"}  # kinds that `auto` chooses from
_REMEDY = "name another folder, or pass --force to make this corpus again"


def existing(config: CorpusConfig, folder: Folder) -> Manifest | None:
    """Return the manifest of the corpus in `folder`, if any; UserError if other inputs made it."""
    if not folder.exists(MANIFEST):
        return None
    manifest = Manifest.read(folder)
    check_config(config, manifest, folder)
    known = manifest.info.get("inputs", {})
    for key, files in inputs_of(config).items():
        with damaged_file(folder.join(MANIFEST)):
            changed = list(changes(known.get(key, []), files))
        for name, was, now in changed:
            raise UserError(
                f"{folder}: its corpus was made from {name} {was}, now {now}; {_REMEDY}"
            )
    return manifest


def check_config(config: CorpusConfig, manifest: Manifest, folder: Folder) -> None:
    """Raise UserError if another configuration than `config` made a corpus; reads no source."""
    old = manifest.info.get("config", {})
    with suppress(ConfigError):  # a corpus of an earlier version lacks keys that were added since
        old = build_settings(CorpusConfig, old, "").model_dump(mode="json")
    changed = differences(old, config.model_dump(mode="json"))
    with damaged_file(folder.join(MANIFEST)):
        kinds = {old.get("tokenizer", {}).get("kind"), manifest.info.get("tokenizer_kind")}
    if config.tokenizer.kind in kinds or (config.tokenizer.kind == "auto" and kinds & _AUTOMATIC):
        changed.pop("tokenizer.kind", None)
    if changed:
        key, (old, new) = next(iter(changed.items()))
        more = f" (and {len(changed) - 1} more keys)" if len(changed) > 1 else ""
        raise UserError(
            f"{folder}: its corpus was made with corpus.{printable(key)}="
            f"{printable(repr(old), _SHOWN_CHARS)}, now it is {printable(repr(new), _SHOWN_CHARS)}"
            f"{more}; "
            f"{_REMEDY}"
        )


def inputs_of(config: CorpusConfig) -> dict[str, list[list[Any]]]:
    """Identify every file that goes into the corpus: `fingerprint`s, a tokenizer file's hash."""
    inputs = {"source": fingerprint(config.source)}
    if config.overlap is not None:
        inputs["overlap"] = fingerprint(config.overlap)
    if config.tokenizer.kind == "file":
        inputs["tokenizer"] = [["hash", make_tokenizer(config.tokenizer, ()).hash, None]]
    return inputs
