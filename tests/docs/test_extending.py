"""The worked examples of `docs/extending.md` run as they stand there."""

from types import SimpleNamespace

import pytest
import torch
from blocks import ROOT, blocks

from raybert.data.sources import formats
from raybert.data.sources.documents import documents
from raybert.data.sources.settings import SourceConfig
from raybert.train import optimizers, schedules
from raybert.tune import schedulers
from raybert.tune.settings import SchedulerConfig


@pytest.fixture
def examples(monkeypatch):
    """Run the page's blocks; what they register is removed afterwards."""
    registries = (
        (optimizers, "OPTIMIZERS"),
        (schedules, "SCHEDULES"),
        (formats, "FORMATS"),
        (schedulers, "SCHEDULERS"),
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
    config = SimpleNamespace(
        optimizer="rmsprop", lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0
    )
    optimizer = optimizers.make_optimizer(model, config)
    before = model.weight.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert isinstance(optimizer, torch.optim.RMSprop)
    assert not torch.equal(before, model.weight)


def test_a_schedule(examples):
    config = SimpleNamespace(schedule="inverse-square-root", decay_fraction=0.3)
    shares = [schedules.schedule_at(step, 100, 10, config) for step in range(100)]
    assert max(shares) <= 1 and shares[39] == pytest.approx((10 / 39) ** 0.5)


def test_a_source_format(examples, tmp_path):
    (tmp_path / "a.records").write_text("one\ntwo\n\nthree\n")
    config = SourceConfig(path=str(tmp_path / "a.records"))
    texts = [text for table in documents(config) for text in table["text"].to_pylist()]
    assert texts == ["one\ntwo", "three"]


def test_a_scheduler(examples):
    from ray.tune.schedulers import MedianStoppingRule

    session = SimpleNamespace(is_ending=False, is_full=False, is_out_of_time=False)
    built = schedulers.SCHEDULERS["median"](SchedulerConfig()).build(None, 3.0, session)
    assert isinstance(built, MedianStoppingRule)
