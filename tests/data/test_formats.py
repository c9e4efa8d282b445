"""Formats: readers, damaged files and bad rows."""

import csv
import io
import json
import os
from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import labelled
from source_files import (
    LABELS,
    TEXTS,
    csv_bytes,
    imdb_files,
    texts_of,
    write,
    write_parquet,
    write_tar,
)

from raybert.data.sources.formats import FORMATS, lines, reader_of, suffixes
from raybert.data.sources.settings import SourceConfig
from raybert.errors import DataError


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_every_format_and_compression_yields_the_same_rows(tmp_path, kind, ending):
    rows = list(zip(TEXTS, LABELS, strict=True))
    if kind == "jsonl":
        data = "".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows).encode()
    else:
        out = io.StringIO(newline="")
        delimiter = "\t" if kind == "tsv" else ","
        csv.writer(out, delimiter=delimiter).writerows([("text", "label"), *rows])
        data = out.getvalue().encode()
    path = write(tmp_path / f"reviews.{kind}{ending}", data)
    found = labelled(SourceConfig(path=str(path)))
    assert found.texts.to_pylist() == TEXTS
    assert found.names == ["neg", "pos"]
    assert found.labels.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS),
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array([t.encode() for t in TEXTS]),
    ],
    ids=["string", "large", "dictionary", "binary"],
)
def test_every_string_type_of_parquet_yields_the_same_texts(tmp_path, column):
    path = write_parquet(tmp_path / "a.parquet", {"review": column, "stars": [1, 0, 2, 0]})
    config = SourceConfig(path=str(path), text_column="review", label_column="stars")
    found = labelled(config)
    assert found.texts.to_pylist() == TEXTS
    assert (found.names, found.labels.tolist()) == (["0", "1", "2"], [1, 0, 2, 0])


def test_plain_text_has_a_document_per_line_or_per_file(tmp_path):
    write(tmp_path / "b.txt", b"three\n")
    write(tmp_path / "a.txt", "one\r\n\n  two ünö \n".encode())
    by_line = SourceConfig(path=str(tmp_path))
    by_file = SourceConfig(path=str(tmp_path), document="file")
    assert texts_of(by_line) == ["one", "two ünö", "three"]
    assert texts_of(by_file) == ["one\r\n\n  two ünö", "three"]


def test_every_format_of_the_registry_is_a_setting_and_has_a_suffix():
    field = SourceConfig.model_json_schema()["properties"]["format"]
    assert field["enum"] == ["auto", *FORMATS, "imdb"]
    assert len(suffixes()) == sum(len(format.suffixes) for format in FORMATS.values())
    assert all(reader_of(name) is format.read for name, format in FORMATS.items())


def test_html_line_breaks_become_spaces_unless_kept(tmp_path):
    path = str(write(tmp_path / "a.txt", b"one<br /><BR>two<br/>three <i>x</i> 1 < 2"))
    assert texts_of(SourceConfig(path=path)) == ["one  two three <i>x</i> 1 < 2"]
    kept = SourceConfig(path=path, html_breaks="keep")
    assert texts_of(kept) == ["one<br /><BR>two<br/>three <i>x</i> 1 < 2"]


def test_truncated_archives_and_files_are_named(tmp_path):
    path = write_tar(tmp_path / "imdb.tar.gz", [*imdb_files(), ("pad", os.urandom(20_000))])
    path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises(DataError, match=rf"^{path} is truncated or damaged \(.*checksum$"):
        texts_of(SourceConfig(path=str(path)))
    (tmp_path / "no.tar").write_bytes(b"hello " * 500)
    with pytest.raises(DataError, match="no.tar is not a tar archive"):
        texts_of(SourceConfig(path=str(tmp_path / "no.tar")))
    for name in ("a.csv.gz", "a.jsonl.gz", "a.txt.gz"):
        rows = [(os.urandom(500).hex(), "x")] * 2 + [(os.urandom(50_000).hex(), "y")]
        data = csv_bytes(rows) if "csv" in name else b'{"text": "' + b"a b" * 9999 + b'"}\n'
        cut_file = write(tmp_path / name, data)
        cut_file.write_bytes(cut_file.read_bytes()[:-20])
        with pytest.raises(DataError, match=f"{name} is truncated or damaged"):
            texts_of(SourceConfig(path=str(cut_file)))
    cut_file = write_parquet(tmp_path / "a.parquet", {"text": TEXTS})
    cut_file.write_bytes(cut_file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a.parquet is no Parquet file, or is cut short: \S"):
        texts_of(SourceConfig(path=str(cut_file)))


BAD_CSV = csv_bytes([("good", "1"), (" ", "0")]) + b"bro\xffken,1\r\nshort\r\nfine,0\r\n"


BAD_JSONL = (
    b'{"text": "good", "label": 1}\n{"text": " ", "label": 0}\n{"text": "bro\xffken", "label": 1}\n'
    b'{"label": 1}\n\n{"text": 5, "label": 1}\n[1]\nnonsense\n{"text": "fine", "label": 0}\n'
    b'{"text": "\\ud800", "label": 1}'
)


@pytest.mark.parametrize(
    ("name", "data", "first", "reasons"),
    [
        (
            "a.csv",
            BAD_CSV,
            "row 2: empty",
            {"empty": 1, "not UTF-8": 1, "wrong number of fields": 1},
        ),
        (
            "a.jsonl",
            BAD_JSONL,
            "line 2: empty",
            {
                "empty": 1,
                "not UTF-8": 2,
                "no text column": 1,
                "not text": 1,
                "not a JSON object": 1,
                "not JSON": 1,
            },
        ),
    ],
)
def test_bad_rows_raise_or_are_counted(tmp_path, name, data, first, reasons):
    path = write(tmp_path / name, data)
    message = rf"^{path}: {first}; fix the row, or set on_bad_row: skip beside its source's path$"
    with pytest.raises(DataError, match=message):
        texts_of(SourceConfig(path=str(path)))
    skipped = Counter()
    config = SourceConfig(path=str(path), on_bad_row="skip")
    assert texts_of(config, skipped=skipped, labels=True) == ["good", "fine"]
    assert skipped == reasons


def test_broken_utf8_names_the_file_and_the_row(tmp_path):
    lines = write(tmp_path / "a.txt", b"fine\nbro\xffken\n")
    with pytest.raises(DataError, match=r"a.txt: line 2: not UTF-8 \(byte 4 is 0xff\)"):
        texts_of(SourceConfig(path=str(lines)))
    table = write(tmp_path / "a.csv", b"text\nfine\nbro\xffken\n")
    with pytest.raises(DataError, match=r"a.csv: row 2: not UTF-8 \(character 4 is byte 0xff\)"):
        texts_of(SourceConfig(path=str(table)))
    column = pa.array([b"fine", b"bro\xffken"]).view(pa.string())
    parquet = write_parquet(tmp_path / "a.parquet", {"text": column})
    with pytest.raises(DataError, match="a.parquet: row 2: not UTF-8"):
        texts_of(SourceConfig(path=str(parquet)))
    tar = write_tar(tmp_path / "a.tar.gz", [("aclImdb/train/pos/0_9.txt", b"\xff")])
    with pytest.raises(DataError, match="a.tar.gz: aclImdb/train/pos/0_9.txt: not UTF-8"):
        texts_of(SourceConfig(path=str(tar)))


@given(st.lists(st.text(), max_size=20), st.integers(1, 7))
@settings(deadline=None)
def test_lines_do_not_depend_on_the_sizes_of_reads(texts, size):
    data = "\n".join(texts).encode("utf-8", "replace")

    class SmallReads(io.BytesIO):
        def readinto(self, buffer):
            return super().readinto(memoryview(buffer)[:size])

    expected = data.split(b"\n")
    assert list(lines(SmallReads(data), "it")) == (expected if expected[-1] else expected[:-1])
