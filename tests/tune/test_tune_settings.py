"""The configuration of a search: a mistake is reported in one line before any trial starts."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from raybert.config import build, load
from raybert.errors import ConfigError
from raybert.experiment import Experiment
from raybert.pipeline.tune_stage import open_search
from raybert.storage.folder import Folder
from raybert.tune.samplers import SAMPLERS
from raybert.tune.schedulers import SCHEDULERS
from raybert.tune.schedulers.pbt import MUTABLE
from raybert.tune.settings import MAY_CHANGE, TrialConfig, TuneConfig
from raybert.tune.space_checks import has_unequal_rungs, longest_epochs, read_space

CONFIGS = Path(__file__).parents[2] / "configs"


def base(**finetune):
    return build(TrialConfig, {"finetune": finetune}, "test")


def space(ranges, finetune=(), **tune):
    config = build(TuneConfig, {"space": ranges, **tune}, "test")
    return read_space(config, base(**dict(finetune)))


def test_the_default_space_can_be_searched():
    found = read_space(TuneConfig(), base())
    assert len(found) > 10
    assert "finetune.adversarial_size" in {d.key for d in found.dimensions}


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        (
            {"finetune.lrr": {"uniform": [1e-4, 1e-3]}},
            "tune.space: unknown key finetune.lrr; did you mean finetune.lr?",
        ),
        ({"finetune.lr": {"uniform": [1e-3, 1e-4]}}, "finetune.lr: uniform=[0.001, 0.0001] is emp"),
        (
            {"finetune.dropout": {"uniform": [0.1, 1.5]}},
            "tune.space: finetune.dropout=1.5: input should be less than 1",
        ),
        (
            {"finetune.global_batch_size": {"choice": [32, 40]}},
            "finetune.global_batch_size=40 is not a multiple of finetune.micro_batch_size=16",
        ),
        (
            {"finetune.head.pooling": {"choice": ["mean", "median"]}},
            "finetune.head.pooling='median",
        ),
        ({"finetune.seed": {"integer": [0, 9]}}, "finetune.seed can't be searched: a seed is no"),
        (
            {"finetune.evaluations": {"integer": [1, 9]}},
            "finetune.evaluations can't be searched: t",
        ),
        ({"finetune.minutes": {"uniform": [1, 2]}}, "finetune.minutes can't be searched: trials"),
        (
            {"finetune.source.limit": {"integer": [1, 9]}},
            "trials are compared on it, so it must be the same",
        ),
        ({"finetune.workers": {"choice": [1, 2]}}, "does not change what is learned"),
        ({"pretrain.lr": {"uniform": [1e-4, 1e-3]}}, "which read the sections finetune and model"),
        ({"model.num_layers": {"choice": [1, 2]}}, "with finetune.initialize_from=scratch"),
        ({"finetune.lr.x": {"uniform": [0, 1]}}, "finetune.lr.x: lr has no keys of its own"),
        ({}, "tune.space is empty"),
    ],
)
def test_an_invalid_space_is_rejected(ranges, words):
    with pytest.raises(ConfigError) as caught:
        space(ranges)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_shape_can_be_searched_from_scratch():
    found = space({"model.num_layers": {"choice": [1, 2]}}, {"initialize_from": "scratch"})
    assert found.dimensions[0].choices == (1, 2)


def test_values_that_are_valid_only_beside_others_are_accepted():
    found = space(
        {
            "finetune.global_batch_size": {"choice": [8, 32]},
            "finetune.micro_batch_size": {"choice": [8, 32]},
        }
    )
    assert len(found) == 2


def has_unequal(name, **finetune):
    overrides = [f"finetune.{key}={value}" for key, value in finetune.items()]
    experiment = load(Experiment, CONFIGS / f"{name}.yaml", overrides)
    base = TrialConfig(model=experiment.model, finetune=experiment.finetune)
    found = read_space(experiment.tune, base)
    return has_unequal_rungs(experiment.tune, found, base)


@pytest.mark.parametrize("name", ["tune", "tune-demo"])
def test_shipped_searches_compare_trials_after_equal_epochs(name):
    assert not has_unequal(name)


def test_evaluations_that_are_spread_over_unequal_lengths_are_detected():
    assert has_unequal("tune", evaluations=6)
    assert not has_unequal("tune-demo", evaluations=6)  # trials of one length


def test_the_number_of_evaluations_can_not_be_a_start_value():
    with pytest.raises(ConfigError, match=r"tune.start: finetune.evaluations can't be searched"):
        space({"finetune.lr": {"uniform": [1e-4, 1e-3]}}, start=[{"finetune.evaluations": 3}])


def test_start_values_are_checked():
    ranges = {"finetune.lr": {"log_uniform": [1e-4, 1e-3]}}
    with pytest.raises(ConfigError, match=r"tune.start: finetune.lr=-1"):
        space(ranges, start=[{"finetune.lr": -1}])
    space(ranges, start=[{"finetune.lr": 2e-4}])
    with pytest.raises(ConfigError, match=r"tune.start: finetune: write keys with their section"):
        space(ranges, start=[{"finetune": {"lr": 2e-4}}])


def test_trials_can_not_be_limited_by_minutes():
    with pytest.raises(ConfigError, match=r"finetune.minutes=3: .* set finetune.minutes=null"):
        space({"finetune.lr": {"uniform": [1e-4, 1e-3]}}, {"minutes": 3})


def test_pbt_rejects_conditions_and_keys_that_can_not_change_during_a_trial():
    pbt = {"scheduler": {"kind": "pbt"}}
    with pytest.raises(ConfigError, match="finetune.epochs can't change while a trial runs"):
        space({"finetune.epochs": {"integer": [1, 3]}}, **pbt)
    conditional = {
        "finetune.r_drop": {"choice": [0.0, 1.0]},
        "finetune.dropout": {"uniform": [0.0, 0.4], "when": {"finetune.r_drop": 1.0}},
    }
    with pytest.raises(ConfigError, match="finetune.dropout: pbt does not support conditions"):
        space(conditional, **pbt)
    keys = base().flat().keys()
    assert MUTABLE <= keys


@pytest.mark.parametrize(
    ("ranges", "finetune", "expected"),
    [
        ({"finetune.epochs": {"integer": [1, 4]}}, {}, 4.0),
        ({"finetune.epochs": {"choice": [2, 1]}}, {}, 2.0),
        ({"finetune.lr": {"uniform": [1e-4, 1e-3]}}, {"epochs": 1.5}, 1.5),
        ({"finetune.lr": {"uniform": [1e-4, 1e-3]}}, {"steps": 30}, 3.0),
        ({"finetune.steps": {"integer": [5, 25]}}, {"steps": 30}, 2.5),
    ],
)
def test_the_epochs_of_the_longest_trial(ranges, finetune, expected):
    assert longest_epochs(space(ranges, finetune), base(**finetune), 10, 1) == expected


def test_every_scheduler_and_sampler_can_be_configured():
    schema = TuneConfig.model_json_schema()
    kinds = schema["$defs"]["SchedulerConfig"]["properties"]["kind"]["enum"]
    assert kinds == list(SCHEDULERS)
    assert schema["properties"]["searcher"]["enum"] == list(SAMPLERS)


# Resuming -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        *("finetune.threads=1", "finetune.log_every=3", "finetune.checkpoint_minutes=1"),
        *("finetune.checkpoint_steps=9", "finetune.keep_checkpoints=3", "finetune.workers=2"),
        *("tune.concurrency=1", "tune.cpus_per_trial=2", "tune.trials=99", "ray.logs=true"),
        "tune.max_failures=5",
    ],
)
def test_a_search_resumes_with_settings_that_do_not_affect_its_trials(tmp_path, override):
    stage, messages = Folder(tmp_path) / "tune", []
    for overrides in ([], [override]):
        experiment = load(Experiment, None, overrides)
        assert open_search(experiment, stage, SimpleNamespace(print=messages.append)) is None
    words = [] if override.startswith("ray.") else [f"{override.partition('=')[0]}: "]
    assert len(messages) == len(words) and all(
        w in line for w, line in zip(words, messages, strict=True)
    )


@pytest.mark.parametrize(
    "override",
    [
        *("finetune.lr=0.5", "finetune.epochs=2", "finetune.evaluations=3", "finetune.seed=3"),
        *("finetune.on_non_finite=stop", "finetune.deterministic=true", "finetune.precision=fp32"),
        *("model.num_layers=9", "tune.seed=3", "tune.scheduler.reduction=2", "tune.searcher=grid"),
    ],
)
def test_a_search_does_not_resume_with_settings_that_affect_its_trials(tmp_path, override):
    stage, quiet = Folder(tmp_path) / "tune", SimpleNamespace(print=lambda text: None)
    open_search(load(Experiment, None, []), stage, quiet)
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        open_search(load(Experiment, None, [override]), stage, quiet)


def test_settings_that_may_change_exist():
    settings = load(Experiment, None, []).model_dump()
    for key in MAY_CHANGE:
        section, _, name = key.partition(".")
        assert name in settings[section]
