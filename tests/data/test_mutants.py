"""Mutated files end in one line of an error, or in bad rows: no traceback, hang, or 2 GB."""

import gzip
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

FAMILIES = ["csv", "json", "table", "archive"]


def read_mutants(family, count, folder):
    # Other seeds each day find other mutants; a failure names its seed.
    seed = os.environ.get("RAYBERT_MUTANTS_SEED") or os.urandom(4).hex()
    script = Path(__file__).with_name("read_mutants.py")
    argv = [sys.executable, str(script), family, str(count), seed, str(folder)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60 + count)
    lines = done.stdout.splitlines()
    assert lines == [str(count)], (
        f"seed {seed}: {lines[:3]} {done.stderr[-2000:]} {done.returncode}"
    )


def test_mutants_are_read_or_refused_in_a_line(tmp_path):
    read_mutants("all", 50 * len(FAMILIES), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many_mutants_are_read_or_refused_in_a_line(tmp_path, family):
    read_mutants(family, 2000, tmp_path)


READ = """
import resource, sys
from collections import Counter
from raybert.data.sources.documents import documents
from raybert.data.sources.settings import SourceConfig
from raybert.errors import UserError
skipped = Counter()
config = SourceConfig(path=sys.argv[1], on_bad_row="skip")
try:
    tables = list(documents(config, skipped=skipped))
    print([text for table in tables for text in table["text"].to_pylist()])
except UserError as error:
    print(error)
print(dict(skipped))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
SIZE = 1_700_000_000


def compressed(path, before, after):
    """A small file of 1.7 GB."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(before)
        for _ in range(SIZE // (1 << 20)):
            file.write(b"a" * (1 << 20))
        file.write(after)


def tar_header(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "before", "after", "skipped"),
    [
        ("a.txt.gz", b"", b"\nfine\n", "longer than 128 MiB"),
        ("a.csv.gz", b'text\n"', b'"\nfine\n', "longer than 32 MiB"),
        ("a.jsonl.gz", b'{"text": "', b'"}\n{"text": "fine"}\n', "longer than 32 MiB"),
        ("a.tar.gz", None, None, None),
    ],
)
def test_a_small_file_that_unpacks_to_gigabytes_is_read_in_little_memory(
    tmp_path, name, before, after, skipped
):
    path = tmp_path / name
    if before is None:
        blocks = SIZE // (1 << 20) * (1 << 20)
        text = tar_header("d/b.txt", 5) + b"fine\n" + bytes(507)
        compressed(path, tar_header("d/big.bin", blocks), text + bytes(1024))
    else:
        compressed(path, before, after)
    argv = [sys.executable, "-c", READ, str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    texts, counts, kilobytes = done.stdout.splitlines()
    assert texts == "['fine']", done.stderr
    assert counts == str({skipped: 1} if skipped else {})
    assert int(kilobytes) < 1 << 20
