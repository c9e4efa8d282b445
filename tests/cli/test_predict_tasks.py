"""`raybert predict` for models of every task: columns, pairs, how many scores and which."""

import json
import subprocess
import sys

import pytest
from commands import refused
from made import TASKS, measured_run, texts_of
from model_directories import make_directory

from raybert.storage.folder import Folder

COLUMNS = {
    "single_label": {"label", "score", "scores"},
    "pairs": {"label", "score", "scores"},
    "multi_label": {"labels", "scores"},
    "regression": {"label", "label_low", "label_high"},
    "token_classification": {"entities"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of a model of each task, trained when a test first asks for it."""
    found = {}

    def get(name):
        if name not in found:
            found[name] = measured_run(Folder(tmp_path_factory.mktemp(name)), name) / "model"
        return found[name].path

    return get


def rows(result):
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


@pytest.mark.parametrize("name", TASKS)
def test_lines_of_standard_input_are_predicted(raybert, models, name):
    texts = [texts_of(row) for row in TASKS[name](6, seed=3).rows]
    stdin = "\n".join("\t".join(text) for text in texts).encode()
    found = rows(raybert("predict", "-m", models(name), stdin=stdin))
    given = {"row", "text", "pair"} if name == "pairs" else {"row", "text"}
    assert [set(row) - given for row in found] == [COLUMNS[name]] * 6
    assert [row["row"] for row in found] == list(range(6))
    assert [[row[k] for k in ("text", "pair") if k in row] for row in found] == texts


def test_a_second_text_is_an_option_or_follows_a_tab(raybert, models):
    model = models("pairs")
    one = rows(raybert("predict", "-m", model, "a team", "--pair", "the goal"))
    assert (one[0]["text"], one[0]["pair"]) == ("a team", "the goal")
    assert rows(raybert("predict", "-m", model, "a team\tthe goal")) == one
    given = ("a team", "some bread", "--pair", "the goal", "--pair", "dinner")
    two = rows(raybert("predict", "-m", model, *given))
    assert two[0] == one[0] and two[1]["pair"] == "dinner"


@pytest.mark.parametrize("name", TASKS)
def test_top_k_limits_the_scores(raybert, models, name):
    text = "\t".join(texts_of(TASKS[name](1).rows[0]))
    at = ("predict", "-m", models(name), text)
    [all_of_them], [best] = rows(raybert(*at)), rows(raybert(*at, "--top-k", 1))
    assert set(best) == set(all_of_them)
    if "scores" in best:
        assert len(best["scores"]) == 1
        [(label, score)] = best["scores"].items()
        assert score == max(all_of_them["scores"].values()) == all_of_them["scores"][label]
    elif "entities" in best:
        assert len(best["entities"]) == min(1, len(all_of_them["entities"]))


def test_a_threshold_selects(raybert, models):
    at = ("predict", "-m", models("multi_label"), "a painting and bread")
    [none], [every] = (rows(raybert(*at, "--threshold", t)) for t in (0.9999, 0.0001))
    assert none["labels"] == [] and none["scores"] == {}
    assert sorted(every["labels"]) == sorted(every["scores"]) == ["art", "food", "sport", "travel"]
    at = ("predict", "-m", models("single_label"), "a painting")
    [none] = rows(raybert(*at, "--threshold", 0.9999))
    assert (none["label"], none["score"], none["scores"]) == (None, None, {})
    [sure] = rows(raybert(*at, "--threshold", 0.0))
    assert len(sure["scores"]) == 4
    found = rows(raybert("predict", "-m", models("token_classification"), "anna", "--threshold", 1))
    assert found[0]["entities"] == []


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("pairs", ["alone"], "text 1 has no second text, and the model reads pairs; write both"),
        ("pairs", ["a", "b", "--pair", "c"], "--pair: 1 second texts for 2 texts; give one for"),
        ("pairs", ["a", "--pair", " "], "--pair 1 is empty; remove it, or write a text"),
        ("single_label", ["a", "--pair", "b"], "reads single texts; leave it out"),
        ("regression", ["a", "--threshold", "0.5"], "--threshold=0.5: a model for regression"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(raybert, models, name, given, words):
    assert words in refused(raybert("predict", "-m", models(name), *given))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_files_are_predicted_with_the_same_options(raybert, ray_session, models, tmp_path, name):
    made = TASKS[name](6, seed=3).rows
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    output = tmp_path / "out.jsonl"
    at = ("predict", "-m", models(name), "--top-k", 1)
    done = raybert(*at, "-i", tmp_path / "new.jsonl", "-o", output)
    assert done.code == 0, done.err
    stdin = "\n".join("\t".join(texts_of(row)) for row in made).encode()
    expected = rows(raybert(*at, stdin=stdin))
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [set(row) for row in found] == [set(row) for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["text"] == other["text"]
        assert one.get("label") == pytest.approx(other.get("label"), abs=0.01)


#: What extras bring, and what only training, the search or the server needs.
NOT_TO_PREDICT = [
    *("ray", "optuna", "fastapi", "starlette", "uvicorn", "matplotlib", "mlflow", "wandb"),
    *("onnx", "onnxruntime", "onnxscript", "huggingface_hub", "transformers", "tensorboardX"),
]


def test_predict_needs_neither_ray_nor_the_search_nor_the_server(tmp_path):
    make_directory(Folder(tmp_path), "ngrams")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({NOT_TO_PREDICT!r}))\n"
        "from raybert.cli.commands import main; main()"
    )
    words = ["predict", "-m", str(tmp_path / "model"), "a superb film"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "a superb film" in done.stdout and '"label"' in done.stdout
