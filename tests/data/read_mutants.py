"""Read mutated files, in a process of its own: `read_mutants.py FAMILY|all COUNT SEED FOLDER`.

Prints a line of JSON for each mutant that is read without the right end: a traceback, a message of
several lines, ten seconds, 2 GB; and last the number of mutants.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import resource
import signal
import sys
import tarfile
import traceback
import zipfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from raybert.data.sources.documents import column_names, describe, documents, raw_rows
from raybert.data.sources.row_table import parse_label
from raybert.data.sources.settings import SourceConfig
from raybert.errors import UserError

SECONDS, BYTES = 10, 2 << 30
TEXTS = ["a good film", "ein schöner, alter Film", 'he said "no"', "two\nlines", "映画", "x" * 300]
NUMBERS = [b"0", b"-1", b"99999999999999999999", b"1e400", b"-1000", b"NaN", b"[" * 50, b'"', b"{}"]
#: What breaks parsers: ends of lines and quotes, escapes, marks of other formats.
TOKENS = [
    *NUMBERS,
    b"\0",
    b"\n",
    b"\r",
    b"\xff\xfe",
    b"\\ud800",
    b"\xef\xbb\xbf",
    b"\x1f\x8b\x08",
    b"PK",
]


class TooLong(BaseException):
    """A mutant took ten seconds."""


def rows(rng):
    return [(rng.choice(TEXTS) + f" {n}", rng.choice(["pos", "neg", "1"])) for n in range(40)]


def as_csv(rng):
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=rng.choice(",;\t|"), quoting=rng.choice([0, 1]))
    writer.writerows([("text", "label"), *rows(rng)])
    return "a.csv", out.getvalue().encode(
        rng.choice(["utf-8", "utf-8", "utf-16", "cp1252"]), "replace"
    )


def as_json(rng):
    records = [
        {"text": text, "label": label, "meta": {"id": [1, 2.5]}} for text, label in rows(rng)
    ]
    form = rng.randrange(3)
    if form == 0:
        return "a.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode()
    return "a.json", json.dumps(
        records if form == 1 else {"data": records}, indent=rng.choice([None, 1])
    ).encode()


def as_table(rng):
    texts, labels = zip(*rows(rng), strict=True)
    columns = {
        "text": list(texts),
        "label": list(labels),
        "n": list(range(40)),
        "l": [[1.5], None] * 20,
    }
    metadata = {"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}
    out = io.BytesIO()
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(metadata)})
    if rng.random() < 0.25:
        with rng.choice([pa.ipc.new_stream, pa.ipc.new_file])(out, table.schema) as writer:
            writer.write_table(table)
        return "a.arrow", out.getvalue()
    pq.write_table(
        table, out, row_group_size=rng.choice([7, 40]), use_dictionary=rng.choice([True, False]),
        compression=rng.choice(["none", "snappy", "zstd"]),
        data_page_version=rng.choice(["1.0", "2.0"]),
    )  # fmt: skip
    return "a.parquet", out.getvalue()


def as_archive(rng):
    members = [
        ("d/a.csv", as_csv(rng)[1]), ("README", b"about " * 99), ("d/b.jsonl", as_json(rng)[1]),
        ("n" * 120 + "/pos/c.txt", b"text"), ("d/ü.txt", b"x" * 700),
    ]  # fmt: skip
    if rng.random() < 0.3:
        members += [(f"aclImdb/train/{label}/0_1.txt", b"a review") for label in ("pos", "neg")]
    out = io.BytesIO()
    if rng.random() < 0.3:
        with zipfile.ZipFile(
            out, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
        ) as pack:
            for name, data in members:
                pack.writestr(name, data)
        return "a.zip", mutated(rng, out.getvalue())
    form = rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    with tarfile.open(fileobj=out, mode="w", format=form) as pack:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if form == tarfile.PAX_FORMAT and rng.random() < 0.5:
                info.pax_headers = {"comment": "c" * 20, "size": str(len(data))}
            pack.addfile(info, io.BytesIO(data))
    data = mutated_tar(rng, out.getvalue())
    suffix, pack = rng.choice(
        [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
    )
    packed = pack(data)
    return f"a.tar{suffix}", mutated(rng, packed) if suffix and rng.random() < 0.3 else packed


FAMILIES = {"csv": as_csv, "json": as_json, "table": as_table, "archive": as_archive}


def mutated(rng, data):
    """A file with a few of its bytes altered, most often near its ends."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        near = rng.choice([len(data), 64, 600])
        at = rng.randrange(min(near, len(data)) or 1)
        at = len(data) - 1 - at if rng.random() < 0.5 else at
        at = max(0, at)
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 2:
            del data[at : at + rng.choice([1, 2, 9, 100])]
        elif kind == 3:
            data[at:at] = rng.choice(TOKENS)
        elif kind == 4:
            data[at : at + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, b"\x7f" * 4])
        elif kind == 5:
            data[at:at] = data[at : at + rng.choice([8, 512])]
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


HOSTILE_FIELDS = [
    b"-1000\0",
    b"00000000000 ",
    b"77777777777 ",
    b"\x80" + b"\0" * 7 + b"\xff" * 4,
    b"\xff" * 12,
]
HOSTILE_PAX = [
    b"0 path=a\n",
    b"11 size=-9\n",
    b"9999 size=9\n",
    b"1" * 3000,
    b"27 size=99999999999999999\n",
]


def mutated_tar(rng, data):
    """Alter headers, whose checksums stay right, or what follows them."""
    data = bytearray(data)
    headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    for _ in range(rng.choice([1, 1, 3])):
        at = rng.choice(headers)
        kind = rng.randrange(5)
        if kind == 0:
            field = rng.choice(HOSTILE_FIELDS)
            data[at + 124 : at + 124 + len(field)] = field
        elif kind == 1:
            data[at + 156] = rng.choice(b"0\0xgXLKS57A")
        elif kind == 2 and data[at + 156] in b"xL":
            record = rng.choice(HOSTILE_PAX)
            data[at + 512 : at + 512 + len(record)] = record
        elif kind == 3:
            data[at + rng.randrange(512)] ^= 1 << rng.randrange(8)
        else:
            return mutated(rng, bytes(data))
        checksum = sum(data[at : at + 148]) + sum(data[at + 156 : at + 512]) + 8 * 32
        data[at + 148 : at + 156] = b"%06o\0 " % checksum
    return bytes(data)


def read(path, rng):
    """Read a file in the ways that stages do; errors of the user's data are right."""
    options = {"on_bad_row": rng.choice(["skip", "skip", "fail"]), "limit": rng.choice([None, 5])}
    config = SourceConfig(path=str(path), keep_columns=rng.choice([[], ["n", "meta"]]), **options)
    for step in (
        lambda: list(documents(config)),
        lambda: list(documents(config, labels=parse_label, skipped=Counter())),
        lambda: describe(config, labels=True),
        lambda: column_names(config),
        lambda: raw_rows(config, 20),
    ):
        try:
            step()
        except UserError as error:
            text = str(error)
            assert text and "\n" not in text and len(text) < 2000, f"message: {text!r}"


def main(family, count, seed, folder):
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TooLong()))
    families = list(FAMILIES) if family == "all" else [family]
    for number in range(int(count)):
        rng = random.Random(f"{family} {seed} {number}")
        chosen = families[number % len(families)]
        name, data = FAMILIES[chosen](rng)
        data = data if chosen == "archive" else mutated(rng, data)
        path = Path(folder) / f"{number}-{name}"
        path.write_bytes(data)
        signal.alarm(SECONDS)
        problem = None
        try:
            read(path, rng)
        except (Exception, TooLong):
            problem = traceback.format_exc()
        signal.alarm(0)
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if used > BYTES:
            problem = f"{used:,} bytes"
        if problem is not None:
            print(
                json.dumps({"mutant": number, "file": str(path), "problem": problem[-1500:]}),
                flush=True,
            )
        else:
            path.unlink()
    print(count)


if __name__ == "__main__":
    main(*sys.argv[1:])
