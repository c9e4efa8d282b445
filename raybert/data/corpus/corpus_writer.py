"""Write tokenized documents into the parts of a corpus: split, drop duplicates, pack, count.

One process does this, in the order of the source, so that the parts' bytes do not depend on how the
work before it was divided.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raybert.data.corpus.attempts import Attempt
from raybert.data.corpus.manifest import SplitManifest
from raybert.data.corpus.parts import PartWriter
from raybert.data.corpus.settings import CorpusConfig
from raybert.data.keyed import U64
from raybert.data.sources.documents import no_documents
from raybert.data.sources.row_table import accept, first_good
from raybert.data.tokenizer import Tokenizer
from raybert.data.unknown import UnknownCount, text_tokens
from raybert.errors import DataError
from raybert.storage.folder import Folder

Bools = npt.NDArray[np.bool_]


class DigestSet:
    """A set of digests, stored as sorted runs of decreasing length (a log-structured merge)."""

    def __init__(self) -> None:
        self._runs: list[U64] = []

    def holds(self, digests: U64) -> Bools:
        """Return which of the digests [n] are in the set, bool [n]."""
        found = np.zeros(len(digests), np.bool_)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, digests), len(run) - 1)
            found |= run[at] == digests
        return found

    def add(self, digests: U64) -> Bools:
        """Add digests [n]; return which are new, bool [n] (of equal ones, the first)."""
        values, first = np.unique(digests, return_index=True)
        unseen = ~self.holds(values)
        new = np.zeros(len(digests), np.bool_)
        new[first[unseen]] = True
        if unseen.any():
            run = values[unseen]
            while self._runs and len(self._runs[-1]) <= 2 * len(run):
                run = np.sort(np.concatenate([self._runs.pop(), run]))
            self._runs.append(run)
        return new


class Packer:
    """Packs a stream of tokens into rows, which do not depend on how `add` divides the stream."""

    def __init__(self, writer: PartWriter, *, seq_len: int, pad_id: int, vocab_size: int) -> None:
        """Start with no tokens; `writer` receives full rows as soon as there are any."""
        self._writer, self._seq_len, self._pad_id = writer, seq_len, pad_id
        self._ids: npt.NDArray[Any] = np.zeros(0, np.uint16)
        self._starts = np.zeros(0, np.bool_)
        self.documents = 0
        self.tokens = 0  # without padding
        self.counts = np.zeros(vocab_size, np.int64)  # [V], of every id, without padding

    def add(
        self, ids: npt.NDArray[Any], word_starts: npt.NDArray[np.bool_], documents: int
    ) -> None:
        """Append the tokens of complete documents: ids [n], word_starts [n]."""
        self.documents += documents
        self.tokens += len(ids)
        self.counts += np.bincount(ids, minlength=len(self.counts))
        if len(self._ids):
            ids = np.concatenate([self._ids, ids])
            word_starts = np.concatenate([self._starts, word_starts])
        whole = len(ids) - len(ids) % self._seq_len
        if whole:
            shape = (-1, self._seq_len)
            self._writer.append(ids[:whole].reshape(shape), word_starts[:whole].reshape(shape))
        # Copies, because a view would keep the whole block in memory.
        self._ids, self._starts = ids[whole:].copy(), word_starts[whole:].copy()

    def close(self) -> None:
        """Write the last row, padded."""
        if not len(self._ids):
            return
        fill = self._seq_len - len(self._ids)
        ids = np.concatenate([self._ids, np.full(fill, self._pad_id, self._ids.dtype)])
        starts = np.concatenate([self._starts, np.ones(fill, np.bool_)])
        self._writer.append(ids[None], starts[None])
        self._ids, self._starts = self._ids[:0], self._starts[:0]


def unigram_loss(
    train: npt.NDArray[np.int64], heldout: npt.NDArray[np.int64], special: npt.NDArray[np.bool_]
) -> float | None:
    """The loss in nats per token of a model that predicts each token by its frequency.

    `train` and `heldout` are counts by id [V]: the first give the add-one smoothed distribution,
    the second are predicted. `special` ids, bool [V], are left out. None if there is no token.
    """
    smoothed, scored = train[~special] + 1.0, heldout[~special]
    if not scored.sum():
        return None
    return float(-(scored * np.log(smoothed / smoothed.sum())).sum() / scored.sum())


TRAIN, HELDOUT = "train", "heldout"


class CorpusWriter:
    """Writes the splits of a corpus from tokenized blocks, which come in order."""

    def __init__(
        self,
        config: CorpusConfig,
        folder: Folder,
        tokenizer: Tokenizer,
        overlap: DigestSet | None,
        attempt: Attempt,
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
                suffix=attempt.suffix,
                before_part=attempt.check,
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
        self._heldout_digests: set[int] = set()  # copies of a held-out text are held out, too
        self.skipped: Counter[str] = Counter()
        self._duplicates = self._overlapping = self._chars = self._unknown_chars = 0
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
        """Add a table of `tokenize_job.tokenize`; a DataError as in `accept`."""
        source = self._config.source
        if source.limit is not None:
            block = first_good(block, source.limit - self.documents_read)
        block = accept(block, source.on_bad_row, self.skipped)
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
        heldout = self._choose_heldout(digests, block["split_hash"].to_numpy(), keep)
        ids, offsets = _flat(block["ids"])
        by_id = self._tokenizer.starts_by_id
        starts = _flat(block["starts"])[0] if by_id is None else by_id[ids]
        self._chars += int(block["chars"].to_numpy()[keep].sum())
        self._unknown_chars += int(block["unknown_chars"].to_numpy()[keep].sum())
        for split, chosen in ((TRAIN, keep & ~heldout), (HELDOUT, heldout)):
            if chosen.any():
                tokens = slice(None) if chosen.all() else np.repeat(chosen, np.diff(offsets))
                self._packers[split].add(ids[tokens], starts[tokens], int(chosen.sum()))

    def _choose_heldout(self, digests: U64, hashes: U64, keep: Bools) -> Bools:
        """Choose the held-out documents of a block, bool [n]."""
        heldout = np.zeros(len(hashes), np.bool_)
        below = hashes < np.uint64(min(self._threshold, 2**64 - 1))
        for index in np.flatnonzero(below & keep).tolist():
            digest = int(digests[index])
            if digest not in self._heldout_digests:
                if len(self._heldout_digests) >= self._config.heldout_max_documents:
                    continue
                self._heldout_digests.add(digest)
            heldout[index] = True
        return heldout

    def close(self) -> tuple[dict[str, SplitManifest], dict[str, Any]]:
        """Write the last rows; return the splits' manifests and the counts."""
        config = self._config
        if not self.documents_read:
            raise no_documents(config.source, self.skipped)
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
        unknown = self._unknown(train.counts + heldout.counts)
        if unknown is None:
            raise DataError(
                f"{', '.join(config.source.paths)}: no document has a token of text; check "
                "corpus.source.text_column and corpus.tokenizer"
            )
        info: dict[str, Any] = {
            "documents": {TRAIN: train.documents, HELDOUT: heldout.documents},
            "tokens": {TRAIN: train.tokens, HELDOUT: heldout.tokens},
            "documents_read": self.documents_read,
            "duplicates": self._duplicates,
            "skipped": dict(sorted(self.skipped.items())),
            "overlap": None if self._overlap is None else self._overlapping,
            "unigram_loss": loss,
            "unknown": unknown,
        }
        return {split: writer.close() for split, writer in self._writers.items()}, info

    def _unknown(self, counts: npt.NDArray[np.int64]) -> float | None:
        """The share of the text that is unknown to the tokenizer; `counts` of every id, [V]."""
        unknown_id = self._tokenizer.unknown_id
        return UnknownCount(
            0 if unknown_id is None else int(counts[unknown_id]),
            int(counts[text_tokens(self._tokenizer)].sum()),
            self._unknown_chars,
            self._chars,
        ).share


def _flat(column: pa.ChunkedArray) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """A list column's values, concatenated, and its offsets from 0; one chunk is not copied."""
    lists = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    offsets = lists.offsets.to_numpy()
    values = lists.values.slice(offsets[0], offsets[-1] - offsets[0])
    return values.to_numpy(zero_copy_only=False), offsets - offsets[0]
