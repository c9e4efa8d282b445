"""Compare the parts of a corpus with its manifest: once, before a run reads them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq

from raybert.data.corpus.manifest import Manifest, PartFile
from raybert.errors import DamagedError
from raybert.storage.folder import Folder

_THREADS = 4  # each holds a part in memory
_REMEDY = "make the corpus again with `raybert corpus --force`"


def verify_parts(
    folder: Folder, manifest: Manifest, on_progress: Callable[[int, int], None]
) -> None:
    """Raise DamagedError for a part with other bytes than were written, or an id of no token.

    Reads the whole corpus once. `on_progress` gets the numbers of parts verified and in all.
    """
    parts = [part for split in manifest.splits.values() for part in split.parts]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda part: _problem(folder, manifest, part), parts)
        for done, (part, problem) in enumerate(zip(parts, found, strict=True), 1):
            if problem is not None:
                pool.shutdown(cancel_futures=True)
                raise DamagedError(f"{folder.join(part.name)} {problem}; {_REMEDY}")
            on_progress(done, len(parts))


def _problem(folder: Folder, manifest: Manifest, part: PartFile) -> str | None:
    try:
        data = folder.read_bytes(part.name)
    except FileNotFoundError:
        return "is missing"
    if hashlib.sha256(data).hexdigest() != part.sha256:
        return "is damaged: its SHA-256 is not that of the manifest"
    largest = -1
    for chunk in pq.read_table(io.BytesIO(data), columns=["input_ids"])["input_ids"].chunks:
        ids = np.frombuffer(chunk.buffers()[1], manifest.dtype)
        begin = chunk.offset * manifest.seq_len
        ids = ids[begin : begin + len(chunk) * manifest.seq_len]
        largest = max(largest, int(ids.max(initial=0)))
    if largest >= manifest.vocab_size:
        return f"has the id {largest:,}, and the vocabulary {manifest.vocab_size:,} tokens"
    return None
