"""Write tokenized documents into the parts of a corpus: split, drop duplicates, pack, count.

One process does this, in the order of the source, so that the parts' bytes do not depend on how the
work before it was divided.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raybert.data.corpus import tokenize_job
from raybert.data.corpus.digest_set import DigestSet
from raybert.data.corpus.manifest import SplitManifest
from raybert.data.corpus.packing import Packer, unigram_loss
from raybert.data.corpus.part_writer import PartWriter
from raybert.data.corpus.settings import CorpusConfig
from raybert.data.sources.documents import no_documents
from raybert.data.sources.row_table import first_good
from raybert.data.tokenizer import Tokenizer
from raybert.errors import DataError
from raybert.storage.folder import Folder

TRAIN, HELDOUT = "train", "heldout"


class _Documents(NamedTuple):
    """The documents of one block: ids and word starts, concatenated, and lengths [n]."""

    ids: npt.NDArray[Any]
    starts: npt.NDArray[np.bool_]
    lengths: npt.NDArray[np.int64]

    def select(self, chosen: npt.NDArray[np.bool_]) -> tuple[Any, Any, int]:
        """Return ids, word starts and number of the documents where `chosen`, bool [n]."""
        if chosen.all():
            return self.ids, self.starts, len(chosen)
        tokens = np.repeat(chosen, self.lengths)
        return self.ids[tokens], self.starts[tokens], int(chosen.sum())


class CorpusWriter:
    """Writes the splits of a corpus from tokenized blocks, which come in order."""

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
        self._held: set[int] = set()  # digests, so that copies of a held-out text are held out
        self._skipped: Counter[str] = Counter()
        self._duplicates = self._overlapping = 0
        self.documents_read = 0  # without bad rows

    @property
    def tokens(self) -> int:
        """Tokens packed so far, in both splits."""
        return sum(packer.tokens for packer in self._packers.values())

    @property
    def is_full(self) -> bool:
        """Whether as many documents were read as the source's limit allows."""
        return self.documents_read == self._config.source.limit

    def add(self, block: pa.Table) -> None:
        """Add a table of `tokenize_job.tokenize`.

        Raises:
            DataError: a file could not be read, or a bad row with `on_bad_row: fail`.
        """
        source = self._config.source
        if source.limit is not None:
            block = first_good(block, source.limit - self.documents_read)
        block = tokenize_job.accept_rows(block, source.on_bad_row, self._skipped)
        self.documents_read += block.num_rows
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
        held = self._held_out(digests, block["lot"].to_numpy(), keep)
        documents = self._documents(block)
        for split, chosen in ((TRAIN, keep & ~held), (HELDOUT, held)):
            if chosen.any():
                self._packers[split].add(*documents.select(chosen))

    def _held_out(
        self, digests: npt.NDArray[np.uint64], lots: npt.NDArray[np.uint64], keep: Any
    ) -> npt.NDArray[np.bool_]:
        """Choose the held-out documents of a block, bool [n]."""
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

    def close(self) -> tuple[dict[str, SplitManifest], dict[str, Any]]:
        """Write the last rows; return the manifests of the splits and the counts.

        Raises:
            DataError: a split has no document.
        """
        config = self._config
        if not self.documents_read:
            raise no_documents(config.source, self._skipped)
        for packer in self._packers.values():
            packer.close()
        train, heldout = self._packers[TRAIN], self._packers[HELDOUT]
        for name, packer in self._packers.items():
            if not packer.documents:
                other = "raise" if name == HELDOUT else "lower"
                raise DataError(
                    f"no document is left for the {name} split of {self.documents_read:,}; {other} "
                    f"corpus.heldout_fraction={config.heldout_fraction} or give more text"
                )
        loss = unigram_loss(train.counts, heldout.counts, self._tokenizer.is_special)
        info: dict[str, Any] = {
            "documents": {TRAIN: train.documents, HELDOUT: heldout.documents},
            "tokens": {TRAIN: train.tokens, HELDOUT: heldout.tokens},
            "documents_read": self.documents_read,
            "duplicates": self._duplicates,
            "skipped": dict(sorted(self._skipped.items())),
            "overlap": None if self._overlap is None else self._overlapping,
            "unigram_loss": loss,
        }
        return {split: writer.close() for split, writer in self._writers.items()}, info


def _flat(column: pa.ChunkedArray) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """A list column's values, concatenated, and its offsets from 0; one chunk is not copied."""
    lists = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(lists, pa.ChunkedArray):
        lists = pa.concat_arrays(lists.chunks)
    offsets = lists.offsets.to_numpy()
    values = lists.values.slice(offsets[0], offsets[-1] - offsets[0])
    return values.to_numpy(zero_copy_only=False), offsets - offsets[0]
