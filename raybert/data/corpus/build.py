"""Make a corpus: text in, tokenized rows in Parquet parts out, as one Ray Data job.

Reading and tokenizing run on any CPU of the cluster; their results come back in the order of the
source to this process, which sets held-out documents apart, drops duplicates, packs and writes.
Nothing that is written depends on how the work was cut up, so the bytes are the same for any number
of CPUs, and blocks in flight are bounded, so memory does not grow with the text. The manifest is
written last: a folder without one holds no corpus.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import pickle
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from raybert.config import Settings, differences
from raybert.data import vocabulary
from raybert.data.corpus import tokenize_job
from raybert.data.corpus.digest_set import DigestSet
from raybert.data.corpus.packing import Packer, unigram_loss
from raybert.data.corpus.parts import FORMAT_VERSION, MANIFEST, Manifest, PartWriter
from raybert.data.sources import documents as sources
from raybert.data.sources.row_table import first_good
from raybert.data.sources.source_config import EvaluationSource, SourceConfig
from raybert.data.text import text_digest
from raybert.data.tokenizer import CONFIG_FILE, TOKENIZER_FILE, Tokenizer, TokenizerConfig
from raybert.errors import DataError, UserError
from raybert.storage.folder import Folder

TRAIN, HELDOUT = "train", "heldout"

_REMEDY = "name another folder, or pass --force to make this one again"

_BLOCK_BYTES = 2 << 20  # of text or ids between operators
_TOKENIZERS_A_READER = 4
_FLIGHT_BYTES = 96 << 20  # object store for blocks under way, at least
_FLIGHT_BYTES_A_CPU = 16 << 20
_OURS = re.compile(rf"({TRAIN}|{HELDOUT})-\d+\.parquet|{TOKENIZER_FILE}|{CONFIG_FILE}|{MANIFEST}")
_UNFINISHED = re.compile(rf"\.(?:{_OURS.pattern})\.[0-9a-f]{{8}}")


class CorpusConfig(Settings):
    """How text becomes a corpus."""

    source: SourceConfig = SourceConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    seq_len: int = Field(256, ge=8, le=65536, description="tokens in a row")
    heldout_fraction: float = Field(
        0.01, gt=0, lt=1, description="of the documents, set apart for evaluation by a text hash"
    )
    heldout_max_documents: int = Field(
        5000,
        ge=1,
        description="held-out documents at most, since evaluation keeps them in memory; where the "
        "fraction is more than that, they come from the source's beginning: lower the fraction",
    )
    duplicates: Literal["drop", "keep"] = Field(
        "drop", description="documents whose text came before"
    )
    overlap: EvaluationSource | None = Field(
        None, description="a test set; how many documents stand in it, too, is reported"
    )
    overlap_drop: bool = Field(False, description="leave out what stands in the test set")
    rows_per_part: int = Field(8192, ge=1, description="rows in a Parquet file")
    rows_per_group: int = Field(32, ge=1, description="rows in a row group, the unit of reading")
    seed: int = Field(0, description="keys which documents are held out")


@dataclass(frozen=True)
class Progress:
    """How far a build has come."""

    stage: Literal["tokenizer", "corpus"]
    documents: int
    tokens: int
    total_documents: int | None  # None where it is not known
    seconds: float  # since the stage began


def existing(config: CorpusConfig, folder: Folder) -> Manifest | None:
    """The manifest of the corpus in `folder` if it is the one that `config` makes.

    Returns:
        None where the folder holds no finished corpus.

    Raises:
        UserError: another configuration or other source files made it.
    """
    if not folder.exists(MANIFEST):
        return None
    manifest = Manifest.read(folder)
    check_config(config, manifest, folder)
    for name, was, now in _inputs_changed(manifest.info.get("inputs", {}), _inputs(config)):
        raise UserError(f"{folder}: its corpus was made from {name} {was}, now {now}; {_REMEDY}")
    return manifest


def check_config(config: CorpusConfig, manifest: Manifest, folder: Folder) -> None:
    """Compare the configuration that made a corpus with this one; needs no source file.

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


def build(
    config: CorpusConfig,
    folder: Folder,
    *,
    progress: Callable[[Progress], None] = lambda progress: None,
    force: bool = False,
) -> Manifest:
    """Make a corpus in `folder`; Ray must be initialised. Nothing happens where it is made already.

    Args:
        config: what to make.
        folder: where; parts of an unfinished build there are deleted.
        progress: is called about as often as a block comes in.
        force: make it again even if it is there.

    Raises:
        UserError: a source, row, tokenizer or folder that can't be used.
    """
    made = None if force else existing(config, folder)
    if made is not None:
        return made
    began = time.monotonic()
    inputs = _inputs(config)
    _check(config)
    overlap = _overlap_digests(config)
    tokenizer, total = _make_tokenizer(config, progress)
    _clear(folder)  # not before the whole source has been read once without a mistake
    sink = _Sink(config, folder, tokenizer, overlap)
    started = time.monotonic()
    for block in _tokenized(config, tokenizer):
        sink.add(block)
        progress(Progress("corpus", sink.read, sink.tokens, total, time.monotonic() - started))
        if sink.is_full:
            break
    splits, info = sink.close()
    tokenizer.save(folder)
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
            "seed": config.seed,
            "seconds": round(time.monotonic() - began, 1),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("raybert", "ray", "tokenizers", "pyarrow")
            },
        },
    )
    folder.write_json(MANIFEST, manifest.model_dump(mode="json"))
    return manifest


def _clear(folder: Folder) -> None:
    """Delete what an earlier build wrote, also files whose writing was cut off; nothing else."""
    for name in [MANIFEST, *folder.names(hidden=True)]:  # the manifest first: then it is no corpus
        if _OURS.fullmatch(name) or _UNFINISHED.fullmatch(name):
            folder.delete(name)


def _check(config: CorpusConfig) -> None:
    if config.rows_per_part % config.rows_per_group:
        nearest = max(1, config.rows_per_part // config.rows_per_group) * config.rows_per_group
        raise UserError(
            f"corpus.rows_per_part={config.rows_per_part} is not a multiple of "
            f"corpus.rows_per_group={config.rows_per_group}; use {nearest}"
        )
    if config.tokenizer.kind == "file":  # before anything is read
        _roles(vocabulary.make(config.tokenizer, ()))


def _roles(tokenizer: Tokenizer) -> None:
    """Raise for a tokenizer without what packing and masking need."""
    _ = tokenizer.pad_id, tokenizer.mask_id
    ids = tokenizer.encode([""]).values
    if len(ids) < 2:
        raise UserError(
            f"{tokenizer.name}: the tokenizer sets no tokens before and after a text, so documents "
            "in a row could not be told apart; give it a template such as [CLS] $A [SEP]"
        )


def _inputs(config: CorpusConfig) -> dict[str, list[list[Any]]]:
    """The identity of every file that goes into the corpus, by the key that names it."""
    inputs = {"source": sources.fingerprint(config.source)}
    if config.overlap is not None:
        inputs["overlap"] = sources.fingerprint(config.overlap)
    if config.tokenizer.kind == "file":
        inputs["tokenizer"] = [["hash", vocabulary.make(config.tokenizer, ()).hash, None]]
    return inputs


def _inputs_changed(
    old: dict[str, list[list[Any]]], new: dict[str, list[list[Any]]]
) -> Iterator[tuple[str, str, str]]:
    """Yield (file, what it was, what it is) for every input that differs."""
    for key in new:
        before = {name: rest for name, *rest in old.get(key, [])}
        after = {name: rest for name, *rest in new[key]}
        for name in [*before, *(name for name in after if name not in before)]:
            if before.get(name) != after.get(name):
                was, now = before.get(name), after.get(name)
                yield name, _identity(was), _identity(now)


def _identity(values: list[Any] | None) -> str:
    if values is None:
        return "(not there)"
    size, mtime = values
    if isinstance(size, str):
        return size[:12]
    if mtime is None:
        return f"of {size:,} bytes"
    when = datetime.datetime.fromtimestamp(mtime / 1e9, datetime.UTC)
    return f"of {size:,} bytes from {when:%Y-%m-%d %H:%M:%S} UTC"


def _make_tokenizer(
    config: CorpusConfig, progress: Callable[[Progress], None]
) -> tuple[Tokenizer, int | None]:
    """The tokenizer, and the number of documents where making it has counted them."""
    if config.tokenizer.kind == "file":
        return vocabulary.make(config.tokenizer, ()), None
    count = 0
    began = time.monotonic()

    def texts() -> Iterator[str]:
        nonlocal count
        for table in sources.documents(config.source):
            yield from table.column("text").to_pylist()
            count += table.num_rows
            progress(Progress("tokenizer", count, 0, None, time.monotonic() - began))

    tokenizer = vocabulary.make(config.tokenizer, texts())
    return tokenizer, count


def _overlap_digests(config: CorpusConfig) -> DigestSet | None:
    if config.overlap is None:
        return None
    digests = DigestSet()
    for table in sources.documents(config.overlap):
        texts = table.column("text").to_pylist()
        drawn = np.frombuffer(b"".join(text_digest(t, config.seed) for t in texts), np.uint64)
        digests.add(drawn[::2])
    return digests


def _tokenized(config: CorpusConfig, tokenizer: Tokenizer) -> Iterator[pa.Table]:
    """Run the Ray Data job; yield its blocks in the order of the source."""
    import ray
    import ray.data
    from ray.data import DataContext, TaskPoolStrategy

    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    shards = sources.shards(config.source)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.target_max_block_size = _BLOCK_BYTES
    options = context.execution_options
    options.preserve_order = True
    options.resource_limits = options.resource_limits.copy(
        object_store_memory=max(_FLIGHT_BYTES, cpus * _FLIGHT_BYTES_A_CPU)
    )
    with DataContext.current(context):
        blocks = ray.data.from_arrow([tokenize_job.shard_table(shard) for shard in shards])
        texts = blocks.map_batches(
            tokenize_job.read_shards,
            fn_kwargs={"config": config.source},
            batch_format="pyarrow",
            # Reading is cheap beside tokenizing, and must not be fused with it: an archive is one
            # task. It takes no CPU: one that waits for its reader would wait for ever on one CPU.
            num_cpus=0,
            compute=TaskPoolStrategy(size=min(math.ceil(cpus / _TOKENIZERS_A_READER), len(shards))),
        )
        tokenized = texts.map_batches(
            tokenize_job.tokenize,
            fn_kwargs={
                "spec": ray.put(pickle.dumps(tokenizer)),
                "hash": tokenizer.hash,
                "seed": config.seed,
            },
            batch_format="pyarrow",
            num_cpus=1,
        )
        yield from tokenized.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=1
        )


class _Documents(NamedTuple):
    """Documents of one block: ids and word starts end to end, lengths [n]."""

    ids: npt.NDArray[Any]
    starts: npt.NDArray[np.bool_]
    lengths: npt.NDArray[np.int64]

    def where(self, chosen: npt.NDArray[np.bool_]) -> tuple[Any, Any, int]:
        """Ids, word starts and number of the chosen documents, bool [n]."""
        if chosen.all():
            return self.ids, self.starts, len(chosen)
        tokens = np.repeat(chosen, self.lengths)
        return self.ids[tokens], self.starts[tokens], int(chosen.sum())


class _Sink:
    """Takes tokenized blocks in order: counts, sets apart, packs, writes."""

    def __init__(
        self,
        config: CorpusConfig,
        folder: Folder,
        tokenizer: Tokenizer,
        overlap: DigestSet | None,
    ) -> None:
        self._config, self._tokenizer, self._overlap = config, tokenizer, overlap
        self._writers = {
            split: PartWriter(
                folder,
                split,
                seq_len=config.seq_len,
                vocab_size=tokenizer.vocab_size,
                rows_per_part=config.rows_per_part,
                rows_per_group=config.rows_per_group,
            )
            for split in (TRAIN, HELDOUT)
        }
        self._packers = {
            split: Packer(
                writer,
                seq_len=config.seq_len,
                pad_id=tokenizer.pad_id,
                vocab_size=tokenizer.vocab_size,
            )
            for split, writer in self._writers.items()
        }
        self._threshold = round(config.heldout_fraction * 2.0**64)
        self._seen = DigestSet()
        self._held: set[int] = set()  # digests, so that copies of a held-out text follow it
        self._skipped: Counter[str] = Counter()
        self._duplicates = self._overlapping = 0
        self.read = 0  # good documents

    @property
    def tokens(self) -> int:
        return sum(packer.tokens for packer in self._packers.values())

    @property
    def is_full(self) -> bool:
        return self.read == self._config.source.limit

    def add(self, block: pa.Table) -> None:
        """Take a block of `job.tokenize`.

        Raises:
            DataError: it holds a file that could not be read, or a bad row where these fail.
        """
        source = self._config.source
        if source.limit is not None:
            block = first_good(block, source.limit - self.read)
        block = tokenize_job.accept_rows(block, source.on_bad_row, self._skipped)
        self.read += block.num_rows
        if block.num_rows:
            self._pack(block)

    def _pack(self, block: pa.Table) -> None:
        config = self._config
        digests = block["digest"].to_numpy()
        keep = np.ones(len(digests), np.bool_)
        new = self._seen.add(digests)
        self._duplicates += int((~new).sum())
        if config.duplicates == "drop":
            keep &= new
        if self._overlap is not None:
            overlapping = self._overlap.holds(digests)
            self._overlapping += int((overlapping & keep).sum())
            if config.overlap_drop:
                keep &= ~overlapping
        held = self._draw(digests, block["lot"].to_numpy(), keep)
        documents = self._documents(block)
        for split, chosen in ((TRAIN, keep & ~held), (HELDOUT, held)):
            if chosen.any():
                self._packers[split].add(*documents.where(chosen))

    def _draw(
        self, digests: npt.NDArray[np.uint64], lots: npt.NDArray[np.uint64], keep: Any
    ) -> npt.NDArray[np.bool_]:
        """Which of a block's documents are held out: bool [n]."""
        held = np.zeros(len(lots), np.bool_)
        below = lots < np.uint64(min(self._threshold, 2**64 - 1))
        for index in np.flatnonzero(below & keep).tolist():
            digest = int(digests[index])
            if digest not in self._held:
                if len(self._held) >= self._config.heldout_max_documents:
                    continue
                self._held.add(digest)
            held[index] = True
        return held

    def _documents(self, block: pa.Table) -> _Documents:
        ids, offsets = _flat(block["ids"])
        by_id = self._tokenizer.starts_by_id
        starts = _flat(block["starts"])[0] if by_id is None else by_id[ids]
        return _Documents(ids, starts, np.diff(offsets))

    def close(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Write what is left; return the splits' manifests and what was counted."""
        config = self._config
        if not self.read:
            raise sources.no_documents(config.source, self._skipped)
        for packer in self._packers.values():
            packer.close()
        train, heldout = self._packers[TRAIN], self._packers[HELDOUT]
        for name, packer in self._packers.items():
            if not packer.documents:
                other = "raise" if name == HELDOUT else "lower"
                raise DataError(
                    f"no document is left for the {name} split of {self.read:,}; {other} "
                    f"corpus.heldout_fraction={config.heldout_fraction} or give more text"
                )
        loss = unigram_loss(train.counts, heldout.counts, self._tokenizer.is_special)
        info: dict[str, Any] = {
            "documents": {TRAIN: train.documents, HELDOUT: heldout.documents},
            "tokens": {TRAIN: train.tokens, HELDOUT: heldout.tokens},
            "documents_read": self.read,
            "duplicates": self._duplicates,
            "skipped": dict(sorted(self._skipped.items())),
            "overlap": None if self._overlap is None else self._overlapping,
            "unigram_loss": loss,
        }
        return {split: writer.close() for split, writer in self._writers.items()}, info


def _flat(column: pa.ChunkedArray) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """A list column's values end to end, and its offsets from 0; no copy of a single chunk."""
    lists = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(lists, pa.ChunkedArray):
        lists = pa.concat_arrays(lists.chunks)
    offsets = lists.offsets.to_numpy()
    values = lists.values.slice(offsets[0], offsets[-1] - offsets[0])
    return values.to_numpy(zero_copy_only=False), offsets - offsets[0]
