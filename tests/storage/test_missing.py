"""A path that is mistyped: the message names what is there, and no download."""

import pytest

from raybert.errors import UserError
from raybert.pipeline.published import find_encoder
from raybert.serve.runtime.model_sources import find_source
from raybert.storage.missing import looks_like_path, near_names
from raybert.storage.registry import resolve_model


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A working folder with runs of which one has a model."""
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "reviews", "tickets"):
        (tmp_path / "runs" / name / "finetune").mkdir(parents=True)
    (tmp_path / "runs/reviews/finetune/model").mkdir()
    (tmp_path / "runs/reviews/finetune/model/config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("runs/none", "runs/none: no such folder; runs has demo, reviews, tickets; name a model/"),
        ("runs/Review", r"no such folder \(did you mean runs/reviews[?]\); name a model/"),
        ("runs/demo/finetun", "did you mean runs/demo/finetune[?]"),
        ("./nothing", "./nothing: no such folder"),
        ("rnus/demo/finetune", "did you mean runs[?]"),
        ("runs/gone/finetune/model", "runs has demo, reviews, tickets"),
        ("runs", "runs: no model here .* as runs/reviews$"),
        ("runs/", "as runs/reviews$"),
        ("runs/demo", r"no model here \(config.json is missing\); name a model/ or a run$"),
    ],
)
def test_a_mistyped_path_is_said_to_be_one(runs, path, words):
    for find in (resolve_model, find_encoder, lambda given: find_source(given, "runs")):
        with pytest.raises(UserError, match=words) as caught:
            find(path)
        assert "download" not in str(caught.value)
    with pytest.raises(UserError, match="no such folder") as caught:
        resolve_model(str(runs / "runs/none"))
    assert str(runs) in str(caught.value)


def test_the_name_of_a_run_alone_is_completed(runs):
    with pytest.raises(UserError, match=r" \(did you mean runs/reviews[?]\)"):
        find_source("reviews", "runs")
    with pytest.raises(UserError, match="a registered model, or download"):
        find_source("bert-base-uncased", "runs")


@pytest.mark.parametrize("name", ["bert-base-uncased", "answerdotai/ModernBERT-base", "a.b/c_d"])
def test_names_on_a_hub_are_no_paths(runs, name):
    assert not looks_like_path(name)
    assert near_names(name) == ""


@pytest.mark.parametrize("path", ["/", "", ".", "~", "a\n", "s3://b/c", "runs/\udcff", "x" * 5000])
def test_any_text_has_near_names(runs, path):
    assert isinstance(near_names(path), str)
