"""Model cards: complete, without paths of the machine, and read by others."""

import re

import pytest
import torch
import yaml
from commands import Experiment
from hypothesis import given
from hypothesis import strategies as st
from made import TASKS, spec_of

from raybert.config import load
from raybert.experiment import Experiment as Configured
from raybert.pipeline import stages
from raybert.pipeline.card_stage import complete_card
from raybert.storage.folder import Folder
from raybert.tasks.finetune import card_of
from raybert.tasks.model_cards import public_name
from raybert.terminal.display import Display

NAMES = st.text("abcdefgh-", min_size=1).filter(lambda name: name.strip("-"))


@given(st.lists(NAMES, min_size=1, max_size=5))
def test_only_the_last_name_of_a_path_is_told(parts):
    path = "/" + "/".join(parts)
    assert public_name(path) == parts[-1]
    assert public_name(f"{path}/finetune/model") == parts[-1]
    assert public_name(f"s3://{path[1:]}?region=x") == f"s3://{path[1:]}"
    assert public_name("sample:imdb") == "sample:imdb"
    cache = f"{path}/models--owner--a--name/snapshots/{'0' * 40}"
    assert public_name(cache) == "owner/a--name"


@pytest.mark.parametrize("name", TASKS)
def test_the_card_of_each_task(tmp_path, name):
    spec = spec_of(Folder(tmp_path), name)
    card = card_of(spec, {"accuracy": 0.5, "loss": 0.25, "rmse": 3.0}, 1.5).render()
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] and "base_model" not in front and "license" not in front
    assert str(tmp_path) not in card and "rows.jsonl" in card
    for section in ("## Data", "## Scores", "## Limits", "## Usage", "random weights", "1.500"):
        assert section in card
    assert ("text_pair" in card) == (name == "pairs")


def test_a_card_tells_what_was_measured(tmp_path):
    torch.set_num_threads(1)
    experiment = Experiment(tmp_path, initialize_from="scratch")
    settings = ["run.license=apache-2.0", "run.language=en", "finetune.epochs=2"]
    configured = load(Configured, experiment.config, settings)
    stages.finetune(configured, Display(quiet=True), in_process=True)
    run = Folder(experiment.run) / "finetune"
    scores = {
        "accuracy": 0.875,
        "metric": "accuracy",
        "n": 80,
        "seen_in_training": False,
        "expected_calibration_error": 0.03,
        "behaviour": {"tests": [{"name": "typos", "passed": 0.75}], "truncated": []},
        "per_class": {"neg": {"precision": 0.5, "recall": 0.25, "f1": 0.125, "support": 40}},
    }
    complete_card(configured, run, Display(quiet=True), scores)
    card = (run / "model").read_text("README.md")
    front = yaml.safe_load(card.split("---")[1])
    assert (front["license"], front["language"]) == ("apache-2.0", "en")
    assert "accuracy 0.8750" in card and "on 80 texts of test.csv" in card
    assert "- Behaviour: typos 75%\n" in card
    assert "expected_calibration_error 0.0300" in card and "| neg | 0.5000 |" in card
    assert not re.search(r"/tmp|/root|" + str(tmp_path), card)
