"""YAML: any text is a value or an error of one line; what is written is read again."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raybert.config import load
from raybert.errors import ConfigError
from raybert.experiment import Experiment
from raybert.yaml_values import parse_yaml, write_yaml

SIGNS = st.sampled_from([*"[]{}:,-?!&*|>'\"%@`#~= \n\t0159axe.+_", "!!int", "!!set", "<<", "\x00"])
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@settings(max_examples=300)
@given(text=st.lists(SIGNS, max_size=20).map("".join) | st.text(max_size=20))
def test_any_text_is_a_value_or_an_error_of_a_line(text):
    try:
        parse_yaml(text, "x")
    except ConfigError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "text",
    [
        *("!!int a", "!!timestamp x", "!!bool x", "!!float x", "[" * 5000, "? [a]\n: b", "<<: 1"),
        *("!!binary é", "9" * 5000, "&a [*b]", BOMB, "a\n\x00", "!!python/name:os.system"),
    ],
)
def test_text_that_is_no_yaml_is_refused(text):
    with pytest.raises(ConfigError, match="^x") as caught:
        parse_yaml(text, "x")
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["2024-02-30", "2024-01-31", "12:30", "1:2:3", "0123", "=", "2001-01-01 00:00:00 +99:00"],
)
def test_what_only_older_yaml_takes_for_dates_and_numbers_is_text(text):
    assert parse_yaml(f"a: {text}", "x") == {"a": text}
    assert parse_yaml(write_yaml({"a": text}), "x") == {"a": text}


@pytest.mark.parametrize(("text", "value"), [("0x1F", 31), ("0o17", 15), ("0", 0), ("+5", 5)])
def test_integers_are_those_of_yaml_1_2(text, value):
    assert parse_yaml(text, "x") == value
    assert parse_yaml(write_yaml({"a": text}), "x") == {"a": text}


def test_a_value_in_a_message_is_cut():
    with pytest.raises(ConfigError, match="pretrain.steps='aaa") as caught:
        load(Experiment, None, [f"pretrain.steps={'a' * 100_000}"])
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_a_file_is_read_as_windows_writes_it(tmp_path, encoding):
    path = tmp_path / "a.yaml"
    text = "run:\r\n  name: mine\r\ncorpus:\r\n  source: {path: Müller.csv}\r\n"
    path.write_bytes(text.encode(encoding))
    if encoding == "utf-16-le":  # without a mark
        with pytest.raises(ConfigError, match="a.yaml"):
            load(Experiment, path)
        return
    assert load(Experiment, path).corpus.source.path == "Müller.csv"


@pytest.mark.parametrize(
    "text", ['{"\\ud800": 1}', '{run: {"\\udfff": 1}}', '{run: {name: "\\ud800"}}']
)
def test_a_lone_surrogate_is_refused(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(Experiment, tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)
