"""The worked examples of `docs/extending.md` run as they stand there."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from blocks import ROOT, blocks
from made import spec_of

from raybert.config import build
from raybert.data.sources import formats
from raybert.data.sources.documents import documents
from raybert.data.sources.settings import SourceConfig
from raybert.errors import ConfigError
from raybert.storage.folder import Folder
from raybert.tasks import registry
from raybert.tasks.settings import PretrainConfig
from raybert.train import optimizers, schedules
from raybert.train.run import train_in_process
from raybert.tune import schedulers
from raybert.tune.settings import TrialConfig, TuneConfig
from raybert.tune.space_checks import read_space


@pytest.fixture
def examples(monkeypatch):
    """Run the page's blocks; what they register is removed afterwards."""
    registries = (
        (optimizers, "OPTIMIZERS"),
        (schedules, "SCHEDULES"),
        (formats, "FORMATS"),
        (schedulers, "SCHEDULERS"),
        (registry, "TASKS"),
    )
    for module, name in registries:
        for key, value in list(getattr(module, name).items()):
            monkeypatch.setitem(getattr(module, name), key, value)
    before = {name: dict(getattr(module, name)) for module, name in registries}
    for block in blocks(ROOT / "docs" / "extending.md"):
        exec(block.code, {})
    yield
    for module, name in registries:
        getattr(module, name).clear()
        getattr(module, name).update(before[name])


def test_an_optimizer(examples):
    model = torch.nn.Linear(3, 2)
    config = build(PretrainConfig, {"optimizer": "rmsprop", "lr": 0.1}, "pretrain")
    optimizer = optimizers.make_optimizer(model, config)
    before = model.weight.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert isinstance(optimizer, torch.optim.RMSprop)
    assert not torch.equal(before, model.weight)


def test_a_schedule(examples):
    config = build(PretrainConfig, {"schedule": "inverse-square-root"}, "pretrain")
    shares = [schedules.schedule_at(step, 100, 10, config) for step in range(100)]
    assert max(shares) <= 1 and shares[39] == pytest.approx((10 / 39) ** 0.5)


def test_a_source_format(examples, tmp_path):
    (tmp_path / "a.records").write_text("one\ntwo\n\nthree\n")
    for name in ("auto", "records"):
        config = build(SourceConfig, {"path": str(tmp_path / "a.records"), "format": name}, "x")
        texts = [text for table in documents(config) for text in table["text"].to_pylist()]
        assert texts == ["one\ntwo", "three"]


def test_a_scheduler(examples):
    from ray.tune.schedulers import MedianStoppingRule

    session = SimpleNamespace(is_ending=False, is_full=False, is_out_of_time=False)
    config = build(TuneConfig, {"scheduler": {"kind": "median"}}, "tune").scheduler
    built = schedulers.SCHEDULERS[config.kind](config).build(None, 3.0, session)
    assert isinstance(built, MedianStoppingRule)


def test_a_task(examples, tmp_path):
    folder = Folder(tmp_path)
    job = spec_of(folder, "regression", task="robust_regression", steps=12, lr=5e-3)
    result = train_in_process(job, folder / "run", on_progress=lambda record: None)
    assert (result["metric"], result["score"]) == ("mae", -result["mae"])
    task, _ = registry.read_task(folder / "run" / "model")
    assert type(task) is registry.TASKS["robust_regression"]
    outputs = np.array([[1.0], [2.0]], np.float32)
    metrics = task.evaluate(outputs, outputs) | {"task": task.name, "metric": task.default_metric}
    assert registry.tables_of(metrics)[0].title == "Scores per target"
    space = read_space(TuneConfig(), TrialConfig(), type(task))
    assert "finetune.label_smoothing" not in {d.key for d in space.dimensions}
    auto = spec_of(folder / "auto", "regression")
    assert auto.prepared.task == "regression"


def test_names_that_nobody_registered_are_refused():
    for key, words in (
        ("optimizer", "'adamw', 'muon' or 'sgd'"),
        ("schedule", "'linear', 'cosine', .*"),
    ):
        with pytest.raises(ConfigError, match=f"{key}='rmsprop': input should be {words}"):
            build(PretrainConfig, {key: "rmsprop"}, "pretrain")
