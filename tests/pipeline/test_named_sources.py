"""Which texts a stage reads: named by the user, or those of the stage before; never a sample."""

import json
from itertools import product

import pytest
from commands import refused
from hypothesis import given
from hypothesis import strategies as st
from making import make_corpus, reviews, write_csv

from raybert.cli.options import load_experiment
from raybert.config import build
from raybert.data.corpus.settings import CorpusConfig
from raybert.data.sources.columns import with_columns_of
from raybert.data.sources.settings import EvaluationSource, SourceConfig
from raybert.errors import ConfigError
from raybert.experiment import Experiment
from raybert.pipeline.named_sources import require_source, with_sources
from raybert.storage.folder import Folder

STAGES = ("corpus", "finetune", "evaluate")


def experiment(tmp_path, **sources):
    values = {"run": {"storage": str(tmp_path / "runs"), "name": "mine"}}
    values |= {stage: {"source": given} for stage, given in sources.items()}
    return build(Experiment, values, "test")


@pytest.mark.parametrize("named", list(product([True, False], repeat=4)))
def test_a_source_is_named_or_that_of_the_stage_before(tmp_path, named):
    *stages, is_built = named
    paths = {}
    for stage, is_named in zip(STAGES, stages, strict=True):
        if is_named:
            paths[stage] = write_csv(Folder(tmp_path), f"{stage}.csv", reviews(4))
    if is_built:
        built = write_csv(Folder(tmp_path), "built.csv", reviews(20))
        config = CorpusConfig(source=SourceConfig(path=built))
        make_corpus(Folder(tmp_path / "runs" / "mine" / "corpus"), config=config)
    found = with_sources(experiment(tmp_path, **{k: {"path": v} for k, v in paths.items()}))
    expected = built if is_built else None
    for stage in STAGES:
        expected = paths.get(stage, expected)
        assert getattr(found, stage).source.path == expected
    if expected is None:
        with pytest.raises(ConfigError, match=r"evaluate.source.path is not set; name your label"):
            require_source(found.evaluate.source, "evaluate.source")


@given(
    data=st.fixed_dictionaries(
        {},
        optional={
            "text_column": st.sampled_from(["text", "body"]),
            "label_column": st.sampled_from(["label", "stars"]),
            "label_separator": st.just("|"),
            "html_breaks": st.just("keep"),
            "on_bad_row": st.just("skip"),
            "document": st.just("file"),
            "limit": st.just(5),
            "split": st.just("train"),
        },
    ),
    own=st.fixed_dictionaries({}, optional={"on_bad_row": st.just("skip"), "limit": st.just(3)}),
)
def test_the_way_a_text_is_read_is_inherited_with_it_but_not_how_much(data, own):
    values = {"corpus": {"source": {"path": "/a.csv", **data}}, "finetune": {"source": own}}
    found = with_sources(build(Experiment, values, "test"))
    for source in (found.finetune.source, found.evaluate.source):
        for name, field in SourceConfig.model_fields.items():
            value = getattr(source, name)
            if name in ("split", "limit"):
                is_own = source is found.finetune.source and name in own
                assert value == (own[name] if is_own else None)
            else:
                assert value == {"path": "/a.csv", **data, **own}.get(name, field.default)
    assert type(found.evaluate.source) is EvaluationSource


@pytest.mark.parametrize("command", ["corpus", "run", "finetune", "evaluate", "tune"])
def test_a_command_without_texts_asks_for_them(raybert, tmp_path, command):
    message = refused(raybert(command, "--set", f"run.storage={tmp_path}"))
    assert "source.path is not set" in message or "no model" in message or "does not ex" in message
    assert "sample" not in message or "--data FILE" in message


@pytest.mark.parametrize("key", ["corpus.overlap", "finetune.validation"])
def test_a_further_source_without_a_path_is_refused(raybert, key):
    message = refused(raybert("config", "--set", f"{key}.limit=5"))
    assert f"{key}.path is not set; name its texts, or leave {key} out" in message


def test_only_the_corpus_is_named_and_fine_tuning_reads_it(raybert, tmp_path):
    """What the demo's last line tells a user to set."""
    texts = write_csv(Folder(tmp_path), "mine.csv", reviews(60), header="body,stars")
    config = CorpusConfig(source=SourceConfig(path=texts, text_column="body"))
    make_corpus(
        Folder(tmp_path / "runs" / "mine" / "corpus"), texts=[t for t, _ in reviews(60)],
        config=config,
    )  # fmt: skip
    done = raybert(
        "finetune", "-n", "mine", "--bare", "--label-column", "stars",
        "--set", f"run.storage={tmp_path}/runs", "--set", "finetune.initialize_from=scratch",
        "--set", "finetune.steps=1", "--set", "finetune.seq_len=16",
        "--set", "model={hidden_size: 16, num_layers: 1, num_heads: 2, max_seq_len: 64}",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert f"54 for training, 6 for validation, of {texts}" in done.err
    run = tmp_path / "runs" / "mine" / "finetune"
    remembered = json.loads((run / "model" / "config.json").read_text())["raybert"]["task"]
    assert remembered["columns"]["text_column"] == "body"
    assert remembered["columns"]["label_column"] == "stars"
    assert f"path: {texts}" in (run / "config.yaml").read_text()


COLUMNS = {"text_column": "body", "label_column": "stars", "pair_column": None}


@pytest.mark.parametrize(
    ("header", "given", "expected"),
    [
        ("body,stars", {}, ("body", "stars")),
        ("body,stars", {"text_column": "text"}, ("body", "stars")),  # as in a complete file
        ("text,label", {}, ("text", "label")),  # a test set with the usual names
        ("text,body,stars", {}, ("body", "stars")),
        ("text,body,stars", {"text_column": "text"}, ("text", "stars")),
        ("body,x", {"label_column": "x"}, ("body", "x")),
        ("a,b", {}, ("body", "stars")),  # neither: the message names what was read before
    ],
)
def test_columns_are_those_that_were_read_before(tmp_path, header, given, expected):
    path = tmp_path / "a.csv"
    path.write_text(header + "\n" + ",".join("x" * len(header.split(","))) + "\n")
    source = with_columns_of(build(EvaluationSource, {"path": str(path), **given}, ""), COLUMNS)
    assert (source.text_column, source.label_column) == expected


def test_one_message_names_all_missing_columns_and_their_options(raybert, tmp_path):
    texts = write_csv(Folder(tmp_path), "mine.csv", reviews(8), header="body,stars")
    at = ("run", "--data", texts, "--set", f"run.storage={tmp_path}/runs")
    assert refused(raybert(*at)) == (
        f"{texts}: no column 'text' and no column 'label'; set text_column (--text-column) and "
        "label_column (--label-column) to one of: body, stars"
    )


def test_the_column_options_set_the_keys_of_all_stages():
    found = load_experiment(None, None, text_column="body", label_column=["a", "b"])
    sources = found.corpus.source, found.finetune.source, found.evaluate.source
    assert [source.text_column for source in sources] == ["body"] * 3
    assert [source.label_column for source in sources[1:]] == [["a", "b"]] * 2
    one = load_experiment(None, ["evaluate.source.label_column=x"], label_column=["stars"])
    assert (one.finetune.source.label_column, one.evaluate.source.label_column) == ("stars", "x")
