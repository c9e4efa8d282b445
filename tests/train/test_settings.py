"""Budgets, ranges of workers, and settings that contradict each other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybert.config import build
from raybert.errors import ConfigError
from raybert.tasks.settings import FinetuneConfig, PretrainConfig
from raybert.train.settings import (
    ALIKE_MAY_CHANGE,
    MAY_CHANGE,
    PRETRAINING,
    ROUNDING,
    TrainConfig,
)


@pytest.mark.parametrize(
    ("limit", "steps"),
    [
        ({"steps": 7}, 7),
        ({"tokens": 1000}, 10),  # an epoch is 50 steps of 100 tokens
        ({"tokens": 1001}, 11),
        ({"tokens": 1}, 1),
        ({"epochs": 2}, 100),
        ({"epochs": 0.5}, 25),
        ({"epochs": 0.001}, 1),
    ],
)
def test_a_budget_in_steps(limit, steps):
    assert TrainConfig(**limit).limit_in_steps(50, tokens_per_epoch=5000) == steps


def test_a_budget_in_minutes_has_no_steps_yet():
    assert TrainConfig(minutes=3).limit_in_steps(50, 5000) is None


def test_defaults_are_limits_in_epochs():
    assert build(PretrainConfig, {}, "x").epochs == 10
    assert build(FinetuneConfig, {}, "x").epochs == 3
    assert build(PretrainConfig, {"minutes": 5}, "x").epochs is None
    assert build(FinetuneConfig, {"steps": 5, "epochs": None}, "x").epochs is None


@pytest.mark.parametrize("config", [PretrainConfig, FinetuneConfig])
def test_two_limits_are_refused(config):
    with pytest.raises(
        ConfigError, match=r"steps=100 and minutes=5.*a run has one limit; keep one"
    ):
        build(config, {"steps": 100, "minutes": 5}, "x")


@given(batch=st.integers(1, 5000), micro=st.integers(1, 5000))
def test_batch_sizes_that_do_not_divide_are_refused_with_valid_ones(batch, micro):
    values = {"global_batch_size": batch, "micro_batch_size": micro, "steps": 1}
    if batch % micro == 0:
        assert build(TrainConfig, values, "x").micro_batches_per_step == batch // micro
        return
    with pytest.raises(ConfigError) as caught:
        build(TrainConfig, values, "x")
    offered = [int(n) for n in str(caught.value).rpartition("use ")[2].split(" or ")]
    for size in offered:
        assert build(TrainConfig, {**values, "global_batch_size": size}, "x")


def test_more_workers_than_micro_batches_are_refused():
    values = {"global_batch_size": 8, "micro_batch_size": 4, "workers": 3}
    with pytest.raises(ConfigError, match="workers=3, but a step has only 2 micro-batches"):
        build(TrainConfig, values, "x")


def test_every_setting_that_may_change_exists():
    assert set(TrainConfig.model_fields) | PRETRAINING >= MAY_CHANGE
    assert set(PretrainConfig.model_fields) >= PRETRAINING


def test_settings_that_affect_the_result_may_not_change():
    decides = {"seed", "global_batch_size", "lr", "schedule", "betas"}
    decides |= {"warmup_fraction", "weight_decay", "max_grad_norm", "deterministic"} | ROUNDING
    assert decides <= {*TrainConfig.model_fields, "sharding"}  # which pretraining has
    assert not decides & MAY_CHANGE
    assert not decides & ALIKE_MAY_CHANGE  # of runs that are compared


@pytest.mark.parametrize(
    ("values", "fewest", "most"),
    [
        ({}, 1, 1),
        ({"workers": 3}, 3, 3),
        ({"workers": {"max": 4}}, 1, 4),
        ({"workers": {"min": 2, "max": 4}}, 2, 4),
    ],
)
def test_a_number_of_workers_or_a_range(values, fewest, most):
    config = build(PretrainConfig, values, "x")
    assert (config.min_workers, config.max_workers) == (fewest, most)
    assert build(PretrainConfig, config.model_dump(mode="json"), "again") == config


@pytest.mark.parametrize(
    ("workers", "words"),
    [
        (0, "x: workers=0: input should be greater than or equal to 1"),
        ({"min": 2}, "x: workers.max is missing; add it, or pass --set workers.max=VALUE"),
        (
            {"min": 3, "max": 2},
            "x: workers.min=3 is more than workers.max=2; lower min or raise max",
        ),
        ({"max": 99}, "x: workers.max=99, but a step has only 8 micro-batches"),
        ({"max": 2, "mox": 3}, "x: unknown key workers.mox; did you mean workers.max?"),
    ],
)
def test_impossible_workers_are_refused(workers, words):
    with pytest.raises(ConfigError) as caught:
        build(PretrainConfig, {"workers": workers}, "x")
    assert str(caught.value).startswith(words)
