"""Speed of `raybert corpus` relative to the bare tokenizer, and memory with ten times the text.

    python benchmarks/corpus.py [--archive aclImdb_v1.tar.gz] [--threads 2] [--repeats 3] --json

Speed: the same texts are encoded alternately by `tokenizers.encode_batch_fast` (2 threads in one
process, ids converted to NumPy) and by `raybert.data.corpus.build.build` (2 Ray tasks of one thread
each), which also removes duplicates, packs and writes. Both read texts from Parquet, so that
neither unpacks an archive. The build's time includes the start of Ray Data's execution; a second
ratio excludes it by starting at the first block.

Memory: the peak during a build of all processes' PSS without shared memory plus the object store's
memory in use, for some documents and for ten times as many, each build with its own Ray and an
object store of the same size.

The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from meter import Meter

from raybert.data.corpus.build import Progress, build
from raybert.data.corpus.settings import CorpusConfig
from raybert.data.sources import documents
from raybert.data.sources.settings import SourceConfig
from raybert.data.tokenizer import Tokenizer
from raybert.data.tokenizer_training import TokenizerConfig, make_tokenizer
from raybert.storage.folder import Folder

ARCHIVE = "aclImdb_v1.tar.gz"
OBJECT_STORE = 256 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", default=os.environ.get("RAYBERT_IMDB", ARCHIVE))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--documents", type=int, default=75_000, help="for the speed")
    parser.add_argument(
        "--small",
        type=int,
        default=10_000,
        help="documents of the smaller corpus",
    )
    parser.add_argument("--json", action="store_true", help="print the result only")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # `tokenizers` reads these when it creates its thread pool, at its first use.
    os.environ["RAYON_NUM_THREADS"] = str(arguments.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if arguments.memory_of:
        print(json.dumps(memory(Path(arguments.memory_of), arguments.threads)))
        return

    def say(text: str) -> None:
        print(text, file=sys.stderr if arguments.json else sys.stdout, flush=True)

    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        everything = write_texts(arguments.archive, base)
        tokenizer = train(everything[0], base / "tokenizer")
        result = {
            **speed(everything, base, tokenizer, arguments, say),
            **memory_ratio(everything, base, arguments, say),
            "threads": arguments.threads,
            "versions": {n: importlib.metadata.version(n) for n in ("ray", "tokenizers")},
        }
    print(json.dumps(result))


def write_texts(archive: str, base: Path) -> list[Path]:
    """Write the documents, shuffled, as Parquet files of 2,500."""
    split: list[str] | None = ["train", "unsup", "test"]
    if not Path(archive).exists():
        archive, split = "sample:all", ["train", "test"]
    config = SourceConfig(path=archive, split=split)
    texts = pa.concat_tables(list(documents.documents(config))).column("text")
    texts = texts.take(pa.array(np.random.default_rng(0).permutation(len(texts))))
    paths = []
    for begin in range(0, len(texts), 2500):
        paths.append(base / f"texts-{begin // 2500:03d}.parquet")
        pq.write_table(pa.table({"text": texts[begin : begin + 2500]}), paths[-1])
    return paths


def train(path: Path, folder: Path) -> Tokenizer:
    texts = pq.read_table(path).column("text").to_pylist()
    tokenizer = make_tokenizer(TokenizerConfig(vocab_size=8192), texts)
    tokenizer.save(Folder(folder))
    return tokenizer


def corpus_config(paths: list[Path], tokenizer: Path) -> CorpusConfig:
    return CorpusConfig(
        source=SourceConfig(path=[str(path) for path in paths]),
        tokenizer=TokenizerConfig(kind="file", path=str(tokenizer)),
        duplicates="keep",  # the bare tokenizer keeps them, too
    )


def speed(
    everything: list[Path],
    base: Path,
    tokenizer: Tokenizer,
    arguments: argparse.Namespace,
    say: Callable[[str], None],
) -> dict[str, Any]:
    import ray

    start_ray(arguments.threads)
    paths = everything[: max(1, arguments.documents // 2500)]
    rows = []
    build(corpus_config(paths[:1], base / "tokenizer"), Folder(base / "warm"), force=True)
    for repeat in range(arguments.repeats):
        tokens, seconds = bare(paths, tokenizer)
        corpus_tokens, whole, after = made(paths, base, repeat)
        assert corpus_tokens == tokens, (corpus_tokens, tokens)
        rows.append((tokens / seconds, corpus_tokens / whole, after))
        say(
            f"{tokens:,} tokens: encode_batch_fast {rows[-1][0]:,.0f}/s, corpus {rows[-1][1]:,.0f}"
            f"/s ({rows[-1][2]:,.0f}/s after its first block)"
        )
    ray.shutdown()
    return {
        "tokens": tokens,
        "encode_batch_fast_tokens_per_second": round(statistics.median(r[0] for r in rows)),
        "tokens_per_second": round(statistics.median(r[1] for r in rows)),
        "ratio": round(statistics.median(r[1] / r[0] for r in rows), 3),
        "ratio_after_first_block": round(statistics.median(r[2] / r[0] for r in rows), 3),
    }


def bare(paths: list[Path], tokenizer: Tokenizer) -> tuple[int, float]:
    """The tokens and seconds of the bare tokenizer."""
    tokens, seconds = 0, 0.0
    for texts in batches(paths):
        began = time.perf_counter()
        encodings = tokenizer.hf.encode_batch_fast(texts)
        ids = [np.array(encoding.ids, np.uint16) for encoding in encodings]
        seconds += time.perf_counter() - began
        tokens += sum(map(len, ids))
    return tokens, seconds


def batches(paths: list[Path]) -> Iterator[list[str]]:
    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1250):
            texts = [t.replace("<br />", " ").strip() for t in batch.column("text").to_pylist()]
            yield texts


def made(paths: list[Path], base: Path, repeat: int) -> tuple[int, float, float]:
    """The tokens and seconds of a build, and its tokens/s from the first block on."""
    seen: list[Progress] = []
    began = time.perf_counter()
    config = corpus_config(paths, base / "tokenizer")
    manifest = build(config, Folder(base / f"corpus-{repeat}"), progress=seen.append)
    whole = time.perf_counter() - began
    tokens = sum(manifest.info["tokens"].values())
    first, last = seen[0], seen[-1]
    return tokens, whole, (last.tokens - first.tokens) / (last.seconds - first.seconds)


def memory_ratio(
    everything: list[Path], base: Path, arguments: argparse.Namespace, say: Callable[[str], None]
) -> dict[str, Any]:
    small = everything[: max(1, min(arguments.small // 2500, len(everything) // 10))]
    large = everything[: 10 * len(small)]
    peaks = []
    for name, paths in (("small", small), ("large", large)):
        listing = base / f"{name}.json"
        listing.write_text(json.dumps([str(p) for p in paths] + [str(base / "tokenizer")]))
        command = [sys.executable, __file__, "--memory-of", str(listing)]
        command += ["--threads", str(arguments.threads)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks.append(json.loads(out.splitlines()[-1]))
        say(f"{peaks[-1]['documents']:,} documents: peak {peaks[-1]['peak'] / 2**20:,.0f} MiB")
    return {
        "peak_mib": [round(p["peak"] / 2**20) for p in peaks],
        "documents": [p["documents"] for p in peaks],
        "memory_ratio": round(peaks[1]["peak"] / peaks[0]["peak"], 3),
    }


def memory(listing: Path, threads: int) -> dict[str, int]:
    """Build from the listed files; return the peak memory of all processes in bytes."""
    *paths, tokenizer = [Path(p) for p in json.loads(listing.read_text())]
    start_ray(threads)
    meter = Meter()
    meter.start()
    folder = Folder(listing.parent / f"memory-{listing.stem}")
    manifest = build(corpus_config(paths, tokenizer), folder)
    meter.stop.set()
    meter.join()
    return {"peak": meter.peak, "documents": manifest.info["documents_read"]}


def start_ray(threads: int) -> None:
    import logging

    import ray

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.init(
        num_cpus=threads,
        object_store_memory=OBJECT_STORE,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


if __name__ == "__main__":
    main()
