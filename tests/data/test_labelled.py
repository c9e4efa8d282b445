"""Labelled documents: label names and ids, and splits by a hash of the text."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import labelled
from source_files import csv_bytes, texts_of, write, write_parquet

from raybert.data.sources.documents import documents
from raybert.data.sources.settings import SourceConfig
from raybert.errors import DataError
from raybert.tasks.labelled import (
    fold_rows,
    peek,
    split_at_random,
    split_by_class,
    split_rows,
)
from raybert.tasks.single_label import SingleLabel


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
    peek(SourceConfig(path=path), SingleLabel)
    with pytest.raises(DataError, match="stars"):
        peek(SourceConfig(path=path, label_column="stars"), SingleLabel)


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


@given(
    texts=st.lists(st.sampled_from("abcdefghijkl"), max_size=60),
    rows=st.integers(0, 70),
    seed=st.integers(0, 5),
)
def test_a_split_keeps_copies_together_for_any_order(texts, rows, seed):
    one = split_rows(texts, rows, seed=seed)
    assert sorted([*one.rest.tolist(), *one.heldout.tolist()]) == list(range(len(texts)))
    assert len(one.heldout) <= rows
    held = {texts[row] for row in one.heldout}
    assert not held & {texts[row] for row in one.rest}
    other = split_rows(texts[::-1], rows, seed=seed)
    assert {texts[::-1][row] for row in other.heldout} == held


def test_a_random_split_holds_out_every_class_that_is_large_enough():
    for seed in range(20):
        classes = ["common"] * 480 + ["rare"] * 12 + ["single"] * 3
        units = [str(number) for number in range(len(classes))]
        split = split_at_random(units, classes, 0.1, seed=seed)
        assert abs(len(split.heldout) - 50) <= 1
        held = {classes[row] for row in split.heldout}
        assert {"common", "rare"} <= held
    exact = split_at_random(units, ["one"] * len(units), 0.1)
    assert exact.heldout.tolist() == split_rows(units, 50).heldout.tolist()


def test_a_split_of_different_texts_is_exact():
    held = split_rows([str(number) for number in range(1000)], 137).heldout
    assert len(held) == 137
    assert np.all(np.diff(held) > 0)


def test_lists_of_words_without_labels_are_texts(tmp_path):
    """As `raybert predict -i` reads the file that a model was trained on."""
    path = write(tmp_path / "a.jsonl", b'{"tokens": ["Anna", "sings"]}\n{"tokens": [1, 2]}\n')
    given = {"path": str(path), "text_column": "tokens"}
    with pytest.raises(DataError, match="line 2: text is neither a string nor a list of words"):
        list(documents(SourceConfig(**given)))
    [table] = documents(SourceConfig(**given, on_bad_row="skip"))
    assert table["text"].to_pylist() == ["Anna sings"]


# Stratified splits and folds ---------------------------------------------------------------------


@st.composite
def classed_units(draw):
    """Units with copies, and a class for each unit."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=8, max_size=60))
    names = draw(st.lists(st.sampled_from("abc"), min_size=len(sizes), max_size=len(sizes)))
    rows = [(f"u{i}", name) for i, name in enumerate(names) for _ in range(sizes[i])]
    rows = draw(st.permutations(rows))
    return [unit for unit, _ in rows], [name for _, name in rows]


@given(classed_units(), st.integers(2, 5))
def test_folds_are_disjoint_whole_and_balanced(rows, folds):
    units, classes = rows
    parts = [fold_rows(units, classes, fold, folds) for fold in range(folds)]
    held = sorted(row for part in parts for row in part.heldout.tolist())
    assert held == list(range(len(units)))
    for part in parts:
        assert not {units[r] for r in part.rest} & {units[r] for r in part.heldout}
    for name in set(classes):
        counts = [sum(classes[row] == name for row in part.heldout) for part in parts]
        assert max(counts) - min(counts) <= 3  # rows of a unit


def test_classes_of_one_text_are_spread_over_the_folds():
    units = [f"text {n}" for n in range(30)]
    assert [len(fold_rows(units, units, fold, 3).heldout) for fold in range(3)] == [10, 10, 10]
    assert len(split_by_class(units, units, 0.2).heldout) == 6


@given(classed_units(), st.floats(0.1, 0.5))
def test_a_stratified_split_takes_the_fraction_of_each_class(rows, fraction):
    units, classes = rows
    part = split_by_class(units, classes, fraction)
    assert not {units[r] for r in part.rest} & {units[r] for r in part.heldout}
    assert abs(len(part.heldout) - fraction * len(units)) <= 3.5
    for name in set(classes):
        count = sum(classes[row] == name for row in part.heldout)
        assert abs(count - fraction * classes.count(name)) <= 6
