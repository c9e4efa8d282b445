"""Files of several formats, which tests of sources read."""

import csv
import gzip
import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from raybert.data.sources.documents import documents
from raybert.data.sources.row_table import parse_label

TEXTS = ["A good film.", "a bad\nfilm, “truly”", 'he said "no"', "<b>four</b>"]


LABELS = ["pos", "neg", "pos", "neg"]


def texts_of(config, *, labels=False, **options):
    options["labels"] = parse_label if labels else None
    return [t for table in documents(config, **options) for t in table.column("text").to_pylist()]


def csv_bytes(rows, header=("text", "label")):
    out = io.StringIO(newline="")
    csv.writer(out).writerows([header, *rows])
    return out.getvalue().encode()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = pa.compress(data, "zstd", asbytes=True)
    path.write_bytes(data)
    return path


def write_parquet(path: Path, columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def imdb_files():
    yield "aclImdb/README", b"about"
    for split in ("train", "test"):
        for label in ("pos", "neg"):
            for number in range(3):
                text = f"{split} {label} {number}<br /><br />end"
                yield f"aclImdb/{split}/{label}/{number}_9.txt", text.encode()
    yield "aclImdb/train/unsup/0_0.txt", b"nobody rated this"


def write_tar(path: Path, members, **options) -> Path:
    with tarfile.open(path, "w:gz", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
