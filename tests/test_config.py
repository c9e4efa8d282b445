"""Configuration: errors that name key, value and remedy, and what is written is what is read."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raybert.cli.options import load_experiment
from raybert.config import Settings, build, differences, dump, flatten, load
from raybert.errors import ConfigError
from raybert.experiment import Experiment
from raybert.train.settings import LIMITS
from raybert.yaml_values import parse_yaml


def refused(values=None, *overrides, path=None):
    with pytest.raises(ConfigError) as caught:
        if path is not None or overrides:
            load(Experiment, path, overrides)
        else:
            build(Experiment, values, "my.yaml")
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pretrian": {}}, "my.yaml: unknown key pretrian; did you mean pretrain?"),
        ({"fine-tune": 1}, "my.yaml: unknown key fine-tune; did you mean finetune?"),
        (
            {"pretrain": {"masking": {"mask-rate": 0.1}}},
            "my.yaml: unknown key pretrain.masking.mask-rate; did you mean "
            "pretrain.masking.mask_rate?",
        ),
        (
            {"pretrain": {"lerning_rate": 1}},
            "my.yaml: unknown key pretrain.lerning_rate; known keys of pretrain: ",
        ),
        (
            {"pretrain": {"micro_batchsize": 1}},
            "my.yaml: unknown key pretrain.micro_batchsize; did you mean "
            "pretrain.micro_batch_size?",
        ),
        (
            {"corpus": {"source": {"txt_column": "body"}}},
            "my.yaml: unknown key corpus.source.txt_column; did you mean "
            "corpus.source.text_column?",
        ),
        (
            {"pretrain": {"masking": {"stratgy": "words"}}},
            "my.yaml: unknown key pretrain.masking.stratgy; did you mean "
            "pretrain.masking.strategy?",
        ),
        (
            {"finetune": {"validation": {"pth": "a"}}},
            "my.yaml: unknown key finetune.validation.pth; did you mean finetune.validation.path?",
        ),
        (  # of another section
            {"pretrain": {"mask-rate": 0.2}},
            "my.yaml: unknown key pretrain.mask-rate; did you mean pretrain.masking.mask_rate?",
        ),
        (
            {"data": {"on_bad_row": "skip"}},
            "my.yaml: unknown key data; did you mean corpus.source.on_bad_row or ",
        ),
        (  # nearly one beside it, which holds more than what it was given
            {"finetune": {"validaton": {"path": "a"}}},
            "my.yaml: unknown key finetune.validaton; did you mean finetune.validation?",
        ),
        (
            {"corpus": {"tokeniser": {"path": "x"}}},
            "my.yaml: unknown key corpus.tokeniser; did you mean corpus.tokenizer?",
        ),
        (  # of that very name elsewhere, before one that only looks like it
            {"pretrain": {"vocab_size": 9}},
            "my.yaml: unknown key pretrain.vocab_size; did you mean corpus.tokenizer.vocab_size?",
        ),
        ({"zzz": 1}, "my.yaml: unknown key zzz; known keys: run, corpus, model, pretrain, "),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(values, message):
    assert refused(values).startswith(message)


def test_batch_sizes_that_do_not_divide_are_refused_with_valid_ones():
    message = refused({"pretrain": {"global_batch_size": 256, "micro_batch_size": 24}})
    assert message == (
        "my.yaml: pretrain.global_batch_size=256 is not a multiple of "
        "pretrain.micro_batch_size=24; use 240 or 264"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model": {"hidden_size": 100, "num_heads": 3}},
            "my.yaml: model.hidden_size=100 is not a multiple of model.num_heads=3; "
            "use model.hidden_size=99 or 102",
        ),
        (
            {"pretrain": {"steps": 5, "minutes": 2}},
            "my.yaml: pretrain.steps=5 and pretrain.minutes=2.0: a run has one limit; keep one, "
            "and set the others to null",
        ),
        ({"run": {"name": "../x"}}, "my.yaml: run.name='../x' is not a valid folder name; use "),
        ({"pretrain": {"lr": -1}}, "my.yaml: pretrain.lr=-1: input should be greater than 0"),
        ({"pretrain": {"lr": "fast"}}, "my.yaml: pretrain.lr='fast': input should be a valid num"),
        (
            {"pretrain": {"schedule": "linaer"}},
            "my.yaml: pretrain.schedule='linaer': input should be 'linear', 'cosine', ",
        ),
        (
            {"corpus": {"tokenizer": {"kind": "file"}}},
            "my.yaml: corpus.tokenizer.kind=file needs path: ",
        ),
        ({"corpus": 3}, "my.yaml: corpus=3: input should be a valid dictionary"),
    ],
)
def test_an_invalid_value_is_refused(values, message):
    assert refused(values).startswith(message)


@pytest.mark.parametrize("limit", ["steps=5", "tokens=1000", "minutes=2", "epochs=3"])
def test_a_limit_on_the_command_line_replaces_the_file_s(tmp_path, limit):
    path = tmp_path / "mine.yaml"
    path.write_text(dump(build(Experiment, {"finetune": {"steps": 7}}, "")))
    loaded = load(Experiment, path, [f"pretrain.{limit}", f"finetune.{limit}"])
    for config in (loaded.pretrain, loaded.finetune):
        given = {name: getattr(config, name) for name in LIMITS}
        name, _, value = limit.partition("=")
        assert given == {**dict.fromkeys(LIMITS), name: int(value)}


def test_no_limit_on_the_command_line_leaves_the_file_s(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("finetune: {steps: 7}")
    assert load(Experiment, path, ["finetune.minutes=null"]).finetune.steps == 7
    with pytest.raises(ConfigError, match="one limit"):
        load(Experiment, path, ["finetune.minutes=1", "finetune.steps=8"])


def test_a_missing_key_is_refused_with_the_option_that_sets_it():
    class Needs(Settings):
        path: str

    with pytest.raises(ConfigError, match=r"^x: path is missing; add it, or pass --set path=VALUE"):
        build(Needs, {}, "x")


@pytest.mark.parametrize(
    "override",
    [
        "run.storage=s3://AKIA:hush@bucket/runs",
        "finetune.source.path=[a.csv, 's3://AKIA:hush@bucket/b.csv']",
        "pretrain.initialize_from=s3://AKIA:hush@bucket/model",
        "evaluate.source.path=s3://bucket/x?secret_key=hush",
    ],
)
def test_credentials_in_any_setting_are_refused_and_not_printed(override):
    message = refused(None, override)
    assert message.startswith(f"--set: {override.partition('=')[0]}: s3://... holds a key")
    assert "hush" not in message and "AKIA" not in message


def test_a_missing_file_is_refused(tmp_path):
    path = tmp_path / "none.yaml"
    assert refused(path=path) == f"--config {path}: No such file or directory"


def test_a_folder_as_file_is_refused(tmp_path):
    assert refused(path=tmp_path) == f"--config {tmp_path}: Is a directory"


def test_a_syntax_error_names_the_line(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("run:\n  name: a\ncorpus: [1, 2\nmodel: {}\n")
    assert refused(path=path).startswith(f"{path}:4: not valid YAML: ")


@pytest.mark.parametrize("data", [b"run: \xff\xfe\n", b"run: \x00\n"])
def test_a_binary_file_is_refused(tmp_path, data):
    path = tmp_path / "bad.yaml"
    path.write_bytes(data)
    assert str(path) in refused(path=path)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "3\n"])
def test_a_file_without_sections_is_refused(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert refused(path=path).startswith(f"{path}: expected `section:` keys at the top, got ")


def test_an_empty_file_is_the_defaults(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert load(Experiment, path) == load(Experiment, None) == Experiment()


def test_set_overrides_the_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("pretrain:\n  lr: 0.5\n  steps: 3\n")
    found = load(
        Experiment,
        path,
        ["pretrain.lr=1e-4", "finetune.head.pooling=mean", "corpus.source.path=[a.csv, b.csv]"],
    )
    assert found.pretrain.lr == 1e-4
    assert found.pretrain.steps == 3
    assert found.finetune.head.pooling == "mean"
    assert found.corpus.source.path == ["a.csv", "b.csv"]


@pytest.mark.parametrize("override", ["pretrain.lr", "=3", "  =3"])
def test_an_override_without_key_or_value_is_refused(override):
    assert refused(None, override).startswith(f"--set {override}: expected `key=value`")


def test_an_error_names_the_file_or_the_option_of_the_value(tmp_path):
    """Where the file was wrong before an override, it still is."""
    path = tmp_path / "bad.yaml"
    path.write_text("pretrain:\n  lr: fast\n")
    assert refused(None, "pretrain.steps=3", path=path).startswith(f"{path}: pretrain.lr='fast': ")
    assert refused(None, "pretrain.lr=slow", path=path).startswith("--set: pretrain.lr='slow': ")
    with pytest.raises(ConfigError, match="^--name: run.name=''"):
        load_experiment(None, None, name="")


def test_an_override_of_an_unknown_key_is_refused():
    message = refused(None, "pretrain.stps=3")
    assert message == "--set: unknown key pretrain.stps; did you mean pretrain.steps?"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2E+3", -2000.0),
        ("3.5e2", 350.0),
        (".5", 0.5),
        ("12", 12),
        ("1_000", 1000),
        ("null", None),
        ("true", True),
        ("e4", "e4"),
        ("1e", "1e"),
        ("'1e-4'", "1e-4"),
        ("a-1e5", "a-1e5"),
        ("1.2.3", "1.2.3"),
    ],
)
def test_numbers_are_read_as_in_yaml_1_2(text, value):
    found = parse_yaml(text, "x")
    assert found == value
    assert type(found) is type(value)


def test_yaml_creates_no_python_objects():
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_yaml("!!python/object/apply:os.system ['true']", "x")


# What is dumped is what is loaded ----------------------------------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
finite = st.floats(1e-300, 1e300)


@settings(max_examples=40, deadline=None)
@given(
    lr=finite,
    eps=finite,
    steps=st.integers(1, 10**12),
    path=st.one_of(text.filter(bool), st.lists(text.filter(bool), min_size=1, max_size=3)),
    column=text,
    examples=st.lists(text, max_size=3),
    betas=st.tuples(finite, finite),
    schedule=st.sampled_from(["linear", "cosine", "stable-decay", "constant"]),
)
def test_a_dumped_configuration_loads_unchanged(
    lr, eps, steps, path, column, examples, betas, schedule
):
    values = {
        "corpus": {"source": {"path": path, "text_column": column}},
        "pretrain": {
            "lr": lr,
            "eps": eps,
            "steps": steps,
            "examples": examples,
            "betas": betas,
            "schedule": schedule,
        },
    }
    experiment = build(Experiment, values, "x")
    written = dump(experiment)
    assert build(Experiment, parse_yaml(written, "y"), "y") == experiment
    assert dump(build(Experiment, parse_yaml(written, "y"), "y")) == written


@pytest.mark.parametrize(
    "text",
    [
        "\x85",
        "a\u2028b",
        "\u2029",
        "1e-4",
        "null",
        "yes",
        "- a",
        "a: b",
        "#",
        "\t",
        " é ",
        "\ufeff",
    ],
)
def test_texts_that_look_like_other_types_stay_texts(text):
    experiment = build(Experiment, {"corpus": {"source": {"text_column": text}}}, "x")
    assert parse_yaml(dump(experiment), "y")["corpus"]["source"]["text_column"] == text


nested = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), text, st.lists(st.integers())),
    lambda inner: st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3),
    max_leaves=8,
)
mappings = st.dictionaries(st.text("abc", min_size=1, max_size=2), nested, max_size=3)


@given(mappings)
def test_a_mapping_has_no_differences_from_itself(values):
    assert differences(values, values) == {}


@given(mappings, mappings)
def test_differences_are_those_of_the_leaves(old, new):
    found = differences(old, new)
    before, after = dict(flatten(old)), dict(flatten(new))
    for key in {*before, *after}:
        assert (key in found) == (before.get(key) != after.get(key))
    assert differences(new, old) == {key: (b, a) for key, (a, b) in found.items()}


# Shipped files -----------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
SHIPPED = sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("raybert/*.yaml")])


def test_there_are_shipped_configurations():
    assert ROOT / "raybert" / "demo.yaml" in SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_configuration_loads_and_describes_its_result(path):
    experiment = load(Experiment, path)
    assert build(Experiment, parse_yaml(dump(experiment), "dump"), "dump") == experiment
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("raybert " in line for line in header)  # the command
    assert any("Hardware" in line for line in header)


def test_the_schema_is_json_and_accepts_shipped_configurations():
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    schema = json.loads(json.dumps(Experiment.model_json_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for path in SHIPPED:
        assert not list(validator.iter_errors(parse_yaml(path.read_text(), "x")))
    assert list(validator.iter_errors({"pretrian": {}}))
    assert list(validator.iter_errors({"pretrain": {"lr": "fast"}}))


def test_every_setting_has_a_description():
    """Fields without a description are sections, or names that say it themselves."""
    silent = {"text_column", "label_column"}

    def walk(model):
        for name, field in model.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, Settings):
                yield from walk(inner)
            elif not field.description and name not in silent:
                yield f"{model.__name__}.{name}"

    assert list(walk(Experiment)) == []
