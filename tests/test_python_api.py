"""The Python API: data in memory, the command line's defaults, and a light import."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from commands import Experiment
from hypothesis import given, settings
from hypothesis import strategies as st
from made import measured_run
from making import reviews, write_csv

import raybert
from raybert.errors import ConfigError, DataError, UserError
from raybert.pipeline.memory_texts import source_path, to_table
from raybert.storage.folder import Folder

ROWS = [{"text": text, "label": label} for text, label in reviews(160)]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """An experiment with a corpus, whose texts are given in memory."""
    return Experiment(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def tuned(experiment):
    options = {"config": experiment.config, "on_ray": False, "quiet": True}
    return raybert.finetune(
        pd.DataFrame(ROWS), settings={"finetune.initialize_from": "scratch"}, **options
    )


def test_a_data_frame_is_learned_from(tuned, experiment):
    assert tuned.folder == experiment.run.as_posix()
    assert tuned.metrics["metric"] == "accuracy" and tuned.metrics["accuracy"] > 0.8
    classifier = tuned.classifier()
    assert classifier.labels == ["neg", "pos"]
    one = classifier("a wonderful superb film")
    assert one["label"] == "pos" and set(one) == {"label", "score", "scores"}
    two = classifier(["a wonderful superb film", "an awful boring film"])
    assert [answer["label"] for answer in two] == ["pos", "neg"] and two[0] == one
    assert classifier([]) == []
    np.testing.assert_allclose(classifier.probabilities(["awful"]).sum(), 1, atol=1e-5)


def test_the_same_texts_resume_and_others_are_refused(tuned, experiment):
    options = {"config": experiment.config, "on_ray": False, "quiet": True}
    settings = {"finetune.initialize_from": "scratch"}
    again = raybert.finetune(pd.DataFrame(ROWS), settings=settings, **options)
    assert again.metrics["step"] == tuned.metrics["step"]
    with pytest.raises(UserError, match="choose another run.name"):
        raybert.finetune(ROWS[:100], settings=settings, **options)


def test_the_command_line_reads_what_the_api_made(raybert_cli, tuned):
    assert raybert_cli("predict", "-m", tuned.folder, "superb", "--json").json["label"] == "pos"


@pytest.fixture
def raybert_cli(capsys, monkeypatch):
    from commands import run_here

    return lambda *arguments: run_here(arguments, b"", capsys, monkeypatch)


def test_mistakes_are_those_of_the_command_line(experiment):
    with pytest.raises(ConfigError, match="unknown key finetune.lrr; did you mean finetune.lr"):
        raybert.finetune(ROWS, settings={"finetune.lrr": 1})
    with pytest.raises(UserError, match="none: no such folder"):
        raybert.Classifier.load(experiment.path / "none")
    with pytest.raises(AttributeError, match="has no attribute 'finetun'"):
        raybert.finetun  # noqa: B018


def test_settings_may_be_nested_or_dotted(experiment):
    from raybert.api import _experiment

    nested = _experiment({}, "n", None, {"finetune": {"lr": 0.5, "head": {"dropout": 0.2}}})
    dotted = _experiment({}, "n", None, {"finetune.lr": 0.5, "finetune.head.dropout": 0.2})
    assert nested == dotted and nested.finetune.lr == 0.5 and nested.run.name == "n"


def test_pairs_are_read_as_pairs(tmp_path):
    model = measured_run(Folder(tmp_path), "pairs") / "model"
    classifier = raybert.Classifier.load(model.path)
    assert classifier([("a team", "the goal")])[0]["label"] in classifier.labels
    with pytest.raises(UserError, match="text 0: the model reads a pair of texts, got 'a team'"):
        classifier("a team")


TABLE = pa.table({"text": ["one", "two"], "label": ["a", "b"]})
FORMS = {
    "list of dicts": TABLE.to_pylist(),
    "generator": lambda: (row for row in TABLE.to_pylist()),
    "columns": TABLE.to_pydict(),
    "arrays": {"text": np.array(["one", "two"]), "label": np.array(["a", "b"])},
    "pandas": TABLE.to_pandas(),
    "pandas with another index": TABLE.to_pandas().set_index(pd.Index([7, 3])),
    "arrow": TABLE,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_source(tmp_path, form):
    data = FORMS[form]() if callable(FORMS[form]) else FORMS[form]
    assert to_table(data).to_pylist() == TABLE.to_pylist()
    first = source_path(FORMS["list of dicts"], Folder(tmp_path))
    data = FORMS[form]() if callable(FORMS[form]) else FORMS[form]
    if form != "arrays" and not form.startswith("pandas"):  # whose strings have another type
        assert source_path(data, Folder(tmp_path)) == first


def test_a_dataset_keeps_its_class_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    from raybert.data.sources.documents import raw_rows
    from raybert.data.sources.settings import SourceConfig

    path = source_path(data, Folder(tmp_path))
    assert [row.label for row in raw_rows(SourceConfig(path=path), 2)] == ["yes", "no"]


@settings(max_examples=20)
@given(st.lists(st.text(st.characters(exclude_categories=("C", "Z")), min_size=1), min_size=1))
def test_texts_in_memory_are_kept(texts):
    assert to_table(texts)["text"].to_pylist() == texts


def test_what_is_no_table_is_refused(tmp_path):
    for data, words in ((7, "expected a path"), ([1, 2], "expected a path"), ([], "no rows")):
        with pytest.raises(DataError, match=words):
            source_path(data, Folder(tmp_path))
    mixed = to_table([{"text": "a", "label": 1}, {"text": "b", "label": "x"}, {"text": "c"}])
    assert mixed["label"].to_pylist() == ["1", "x", None]


def test_paths_stay_paths(tmp_path):
    path = write_csv(Folder(tmp_path), "rows.csv", reviews(4))
    assert source_path(path, Folder(tmp_path)) == path
    assert source_path(tmp_path / "rows.csv", Folder(tmp_path)) == path
    assert source_path([tmp_path / "a", tmp_path / "b"], Folder(tmp_path))[1].endswith("/b")


def test_the_import_is_light_and_lists_its_names():
    code = (
        "import raybert, sys; assert not {'torch', 'ray', 'numpy'} & set(sys.modules); "
        "assert {'finetune', 'tune', 'Classifier'} <= set(dir(raybert)); "
        "import raybert.tune; assert callable(raybert.tune)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow
@pytest.mark.ray
def test_all_stages_from_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {
        "corpus": {"seq_len": 16, "heldout_fraction": 0.1, "tokenizer": {"vocab_size": 300}},
        "model": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_seq_len": 64},
        "pretrain": {"steps": 4, "evaluations": 1, "global_batch_size": 8, "micro_batch_size": 4},
        "finetune": {"steps": 20, "seq_len": 32, "evaluations": 1, "lr": 1e-2},
        "tune": {"seeds": 1, "finalists": 1, "searcher": "random"},
    }
    options = {"name": "mine", "settings": settings, "quiet": True}
    pretrained = raybert.pretrain([row["text"] for row in ROWS], **options)
    assert pretrained.metrics["step"] == 4
    test = [{"text": text, "label": label} for text, label in reviews(40, seed=1)]
    tuned = raybert.finetune(ROWS, test=test, **options)
    assert tuned.metrics["n"] == 40 and tuned.metrics["seen_in_training"] is False
    won = raybert.tune(ROWS, test=test, trials=2, **options)
    assert won.classifier()("superb")["label"] in ("neg", "pos")


def test_each_task_answers(tmp_path):
    run = measured_run(Folder(tmp_path), "token_classification")
    classifier = raybert.Classifier.load(run.path)
    assert set(classifier("anna lives in oslo")) == {"entities"}
