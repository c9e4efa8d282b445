"""Labels: one spelling whatever the format, and names for numbers."""

import csv
import io
import json
import unicodedata

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import labelled
from source_files import write, write_parquet

from raybert.config import load
from raybert.data.sources.labels import name_of, spell
from raybert.data.sources.settings import SourceConfig
from raybert.errors import ConfigError, DataError
from raybert.experiment import Experiment
from raybert.tasks.multi_label import MultiLabel
from raybert.tasks.single_label import SingleLabel

NAMES = st.text(st.characters(exclude_categories=("C", "Z"), include_characters=" "), max_size=8)
VALUES = st.one_of(
    st.booleans(),
    st.integers(-(2**62), 2**62),
    st.integers(-(2**40), 2**40).map(float),
    st.sampled_from(
        [
            "True",
            "FALSE",
            "1.0",
            "-2.00",
            "0.0",
            "-0",
            "\ufeffpos",
            "pos\u200b",
            "café",
            "cafe\u0301",
            " pos ",
            "a  b",
        ]
    ),
    NAMES,
)


def files(folder, values):
    """The same labels in files of every format."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("text", "label"), *((f"t{n}", v) for n, v in enumerate(values))])
    yield write(folder / "a.csv", text.getvalue().encode())
    rows = [json.dumps({"text": f"t{n}", "label": v}) + "\n" for n, v in enumerate(values)]
    yield write(folder / "a.jsonl", "".join(rows).encode())
    texts = [f"t{n}" for n in range(len(values))]
    for number, kind in enumerate({type(value) for value in values}):
        column = pa.array([v if type(v) is kind else None for v in values])
        yield write_parquet(folder / f"{number}.parquet", {"text": texts, "label": column})


@given(st.lists(VALUES, min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_value_has_one_spelling_in_all_formats(tmp_path_factory, values):
    folder = tmp_path_factory.getbasetemp() / "spelling"
    expected = {f"t{n}": spell(value)[0] for n, value in enumerate(values)}
    expected = {text: label for text, label in expected.items() if label is not None}
    seen = set()
    for path in files(folder, values):
        config = SourceConfig(path=str(path), on_bad_row="skip")
        try:
            from raybert.tasks.labelled import read_labelled

            found = read_labelled(config, SingleLabel)
        except DataError:
            continue
        pairs = dict(zip(found.texts.to_pylist(), found.labels.to_pylist(), strict=True))
        assert pairs.items() <= expected.items(), path.name
        if path.suffix != ".parquet":
            assert pairs == expected, path.name
        seen |= pairs.keys()
    assert seen == expected.keys()


@given(VALUES)
def test_a_spelling_is_its_own_spelling(value):
    label, problem = spell(value)
    assert (label is None) == (problem is not None)
    if label is not None:
        assert spell(label) == spell(label.encode()) == (label, None)
        assert unicodedata.is_normalized("NFC", label)


@pytest.mark.parametrize(
    ("values", "spelling"),
    [
        ([True, "true", "True", "TRUE", b"True"], "true"),
        ([1, 1.0, "1", "1.0", "1.00", "1."], "1"),
        ([0, 0.0, -0.0, "0", "-0.0"], "0"),
        ([0.5, "0.5"], "0.5"),
        (["3.10"], "3.10"),
        (["007"], "007"),
        (["caf\u00e9", "cafe\u0301", " caf\u00e9\n"], "caf\u00e9"),
        (["a b", "a  b", "a\u00a0b"], "a b"),
        ([10**5000, "1" + "0" * 5000], "1" + "0" * 5000),
    ],
)
def test_spellings(values, spelling):
    assert {spell(value)[0] for value in values} == {spelling}


def test_float32_is_the_number_that_was_written(tmp_path):
    column = pa.array([0.1, 2.0], pa.float32())
    path = write_parquet(tmp_path / "a.parquet", {"text": ["a", "b"], "label": column})
    assert labelled(SourceConfig(path=str(path))).names == ["2", "0.1"]


@pytest.mark.parametrize("value", [1, 1.0, True, "1", "1.0", "true", "True", "yes", b"yes"])
@pytest.mark.parametrize("names", [["no", "yes"], ["No", "yes"]])
def test_names_for_numbers_fit_every_spelling_of_the_number(value, names):
    assert name_of(value, names) == ("yes", None)


@pytest.mark.parametrize(
    ("value", "names", "found"),
    [
        ("9" * 5000, ["a", "b"], None),
        ("٣", ["a", "b", "c", "d"], None),  # a digit, but no ASCII one
        ("0", ["1", "2"], None),  # stars have no 0
        ("True", ["False", "True"], "True"),  # names of an earlier model stay as they are
        (1.0, ["0.0", "1.0"], "1.0"),
        ("1", ["0.0", "1.0"], "1.0"),
        (True, ["False", "True"], "True"),
        ("café", ["cafe\u0301", "b"], "cafe\u0301"),
    ],
)
def test_a_label_is_found_among_names(value, names, found):
    label, problem = name_of(value, names)
    assert label == found
    assert (problem is None) == (found is not None)
    assert problem is None or len(problem) < 200


def test_no_and_yes_are_words_in_the_configuration(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "finetune: {source: {labels: [no, yes]}}\nray: {dashboard: yes}\ncorpus: {overlap: null}\n"
    )
    read = load(Experiment, path, ["evaluate.source.labels=[off, on]"])
    assert read.finetune.source.labels == ["no", "yes"]
    assert read.evaluate.source.labels == ["off", "on"]
    assert read.ray.dashboard is True
    for names in ("[a, 'a ']", "[1, 1.0]", "[true, 'True']", "[a, '']"):
        with pytest.raises(ConfigError, match=r"expected two or more different labels"):
            load(Experiment, None, [f"finetune.source.labels={names}"])


def test_lists_of_labels_have_the_same_spellings():
    parse = MultiLabel.parser(SourceConfig(label_separator="|"))
    expected = '["1", "true", "café"]'
    for value in (
        [1, True, "café"],
        [1.0, "True", "cafe\u0301"],
        "1.0|TRUE| café|",
        b"1|true|caf\xc3\xa9",
    ):
        assert parse("text", value)[1:] == (expected, None)
    columns = {"a": "1.0", "b": False, "c": "0.0", "d": "Yes"}
    assert MultiLabel.parser(SourceConfig())("text", columns)[1] == '["a", "d"]'


def test_marks_that_nothing_shows_and_signs_of_zero_make_no_label():
    assert {spell(name)[0] for name in ("pos", "\ufeffpos", "pos\u200b ", "\xa0pos")} == {"pos"}
    assert {spell(zero)[0] for zero in ("0", "-0", "-0.0", -0.0, 0)} == {"0"}
    assert spell("\u200b")[1] == "no label"
