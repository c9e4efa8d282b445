"""Regression: targets read, scaled, scored, answered in their unit."""

import json

import numpy as np
import pytest
import torch

from raybert.data.sources.settings import SourceConfig
from raybert.errors import DataError
from raybert.model.encoder import Encoder
from raybert.model.heads import Classifier
from raybert.model.settings import ModelConfig
from raybert.records import finite
from raybert.tasks.protocol import AnswerOptions
from raybert.tasks.regression import Regression

TASK = Regression(["x", "y"])


def parse(value, **settings):
    _, label, problem = Regression.parser(SourceConfig(**settings))("a text", value)
    return json.loads(label) if problem is None else problem


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2.5, [2.5]),
        ("-1e3", [-1000.0]),
        (b"3", [3.0]),
        ([1, "2.5"], [1.0, 2.5]),
        ({"x": 1, "y": 2}, [1.0, 2.0]),
        (True, [1.0]),
        (None, "no target"),
        ("", "no target"),
        (float("nan"), "target is not finite (nan)"),
        ("inf", "target is not finite (inf)"),
        ("many", "target is no number ('many')"),
        ([], "row has 0 numbers in place of at least one"),
    ],
)
def test_targets_are_read(value, expected):
    assert parse(value) == expected


def test_names_come_from_columns():
    assert Regression.find_labels(["[1.0]"], SourceConfig(label_column="stars")) == ["stars"]
    two = SourceConfig(label_column=["x", "y"])
    assert Regression.find_labels(["[1.0, 2.0]"], two) == ["x", "y"]
    with pytest.raises(DataError, match="2 numbers, labels names 3"):
        Regression.find_labels(["[1.0, 2.0]"], SourceConfig(labels=["a", "b", "c"]))


def test_an_exported_model_answers_in_the_unit_of_the_targets():
    targets = np.array([[100.0, 1.0], [300.0, 1.0], [200.0, 1.0]], np.float32)
    task = TASK.prepare(targets)
    torch.manual_seed(0)
    encoder = Encoder(ModelConfig(hidden_size=16, num_layers=1, num_heads=2), 32, 0)
    model = Classifier(encoder, 2).eval()
    ids = torch.arange(1, 9).view(2, 4)
    with torch.no_grad():
        standardised, exported = model(ids), task.export(model)(ids)
    assert np.allclose(task.to_unit(standardised.numpy()), exported.numpy(), rtol=1e-4, atol=1e-4)
    assert torch.equal(model(ids), standardised), "the training model is unchanged"


def test_the_loss_is_that_of_standardised_targets():
    targets = np.array([[10.0, 5.0], [20.0, 7.0]], np.float32)
    task = TASK.prepare(targets)
    loss = task.make_loss(None, targets)
    perfect = torch.tensor((targets - targets.mean(0)) / targets.std(0))
    assert loss(perfect, torch.tensor(targets)).item() == pytest.approx(0, abs=1e-9)
    assert loss(torch.zeros(2, 2), torch.tensor(targets)).item() == pytest.approx(2.0)
    unknown = torch.tensor(targets)
    unknown[1] = float("nan")
    assert loss(torch.zeros(2, 2), unknown).item() == pytest.approx(1.0)


def test_metrics_and_intervals():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(500, 2)).astype(np.float32)
    found = truth + rng.normal(scale=0.1, size=truth.shape).astype(np.float32)
    task = TASK.fit(found, truth)
    scores = task.evaluate(found, truth)
    assert scores["rmse"] == pytest.approx(0.1, rel=0.1)
    assert scores["spearman"] > 0.98
    assert scores["r2"] > 0.98
    assert scores["per_target"]["x"]["coverage"] == pytest.approx(0.9, abs=0.01)
    json.dumps(scores)
    [answer] = task.answers(found[:1], None, AnswerOptions())
    assert [each["label"] for each in answer] == ["x", "y"]
    assert all(each["low"] < each["score"] < each["high"] for each in answer)
    assert set(task.columns([answer])[0]) == {"x", "x_low", "x_high", "y", "y_low", "y_high"}


def test_intervals_of_new_rows_have_the_promised_coverage():
    """The law of split-conformal intervals, whatever the distribution of residuals."""
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(200):
        residuals = rng.standard_cauchy((60, 1))
        task = Regression(["x"]).fit(residuals[:50], np.zeros((50, 1)))
        covered.append(np.mean(np.abs(residuals[50:]) <= task.fitted["intervals"][0]))
    assert np.mean(covered) == pytest.approx(0.9, abs=0.03)


def test_a_constant_target_is_no_division_by_zero():
    targets = np.ones((4, 2), np.float32)
    task = TASK.prepare(targets)
    scores = task.evaluate(targets, targets)
    assert finite(scores)["spearman"] is None and finite(scores)["r2"] is None
    assert scores["rmse"] == 0.0
    assert np.isfinite(list(task.fitted["std"])).all()
