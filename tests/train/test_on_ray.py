"""Training on Ray: equal batches for any number of workers, and a lost worker changes nothing."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from making import make_corpus, pretrain_job, same_tensors

from raybert.errors import ConfigError
from raybert.ray_session import Resources
from raybert.storage import Folder
from raybert.text.batches import BatchPlan, ray_micro_batches
from raybert.text.masking import MaskingConfig, Vocabulary
from raybert.text.order import Order, deal
from raybert.text.parts import Manifest, PartReader
from raybert.text.tokenizer import Tokenizer
from raybert.train.checkpoint import CheckpointStore
from raybert.train.group import Group
from raybert.train.meters import read_metrics
from raybert.train.pretrain import PretrainJob, PretrainTask
from raybert.train.run import Feed, execute_bare, read_digests

pytestmark = pytest.mark.ray

RESOURCES = Resources(cpus=4, gpus=0, object_store=512 << 20, started_here=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("on-ray")) / "corpus"
    make_corpus(folder, documents=400)
    return folder


@pytest.fixture(scope="module", autouse=True)
def importable():
    """Workers unpickle what is defined here."""
    import sys

    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def plan_of(corpus, total_steps):
    tokenizer = Tokenizer.load(corpus)
    reader = PartReader(corpus, Manifest.read(corpus), "train")
    return BatchPlan(
        reader=reader,
        order=Order(reader.rows, reader.rows_per_group, 12, 3, seed=5),
        masking=MaskingConfig(mask_rate=0.3, mask_rate_end=0.1),
        vocabulary=Vocabulary(tokenizer.mask_id, tokenizer.is_special),
        total_steps=total_steps,
    )


def digests(stream):
    return [[(b.step, b.slot, b.digest()) for b in batches] for batches in stream]


def test_batches_from_ray_are_those_of_this_process(ray_session, corpus, monkeypatch):
    """For one to four workers, from a step in mid-epoch and into the next epochs."""
    monkeypatch.setattr("raybert.text.batches._MOST_TASKS", 2)  # fewer than windows: some share one
    plan = plan_of(corpus, 300)
    begin = plan.order.steps_per_epoch // 2
    steps = range(begin, begin + 2 * plan.order.steps_per_epoch + 3)
    expected = digests(plan.micro_batches(range(4), steps))
    assert len({d for step in expected for _, _, d in step}) == sum(map(len, expected))
    for world_size in (1, 2, 3, 4):
        merged = [[] for _ in steps]
        for slots in deal(4, world_size):
            made = digests(ray_micro_batches(plan, slots, steps, cpus=0.4, memory=64 << 20))
            assert len(made) == len(steps)
            for step, part in zip(merged, made, strict=True):
                step += part
        assert merged == expected


@dataclass(frozen=True)
class FatalJob(PretrainJob):
    """Finds on a worker what the user can mend."""

    def make_task(self, group, feed):
        if group.rank == group.world_size - 1:
            raise ConfigError("pretrain.lr=7 is too much for the worker")
        return PretrainTask(self, group, feed)


@dataclass(frozen=True)
class DeadlyJob(PretrainJob):
    """Kills its last worker with SIGKILL, once, when it asks for the batches of a step."""

    marker: str = ""
    at: int = 0

    def make_task(self, group, feed):
        return DeadlyTask(self, group, feed)


class DeadlyTask(PretrainTask):
    def batches(self, first_step, total_steps):
        for batches in super().batches(first_step, total_steps):
            marker = Path(self._job.marker)
            last = self._group.rank == self._group.world_size - 1
            if last and batches[0].step == self._job.at and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield batches


def train(job, run):
    from raybert.train.worker import train_on_ray

    return train_on_ray(job, run, RESOURCES)


def test_a_workers_word_to_the_user_is_what_the_user_gets(ray_session, corpus, tmp_path):
    job = pretrain_job(corpus, workers=2)
    job = FatalJob(**job.__dict__)
    with pytest.raises(ConfigError, match="^pretrain.lr=7 is too much for the worker$"):
        train(job, Folder(tmp_path))


@pytest.mark.slow
def test_a_killed_worker_changes_nothing_in_the_result(ray_session, corpus, tmp_path):
    settings = {
        "workers": 2,
        "steps": 30,
        "digests": True,
        "deterministic": True,
        "checkpoint_steps": 8,
        "evaluations": 3,
        "collective_timeout_s": 30,
    }
    job = pretrain_job(corpus, {"dropout": 0.1}, **settings)
    whole, killed = Folder(tmp_path / "whole"), Folder(tmp_path / "killed")
    train(job, whole)
    marker = tmp_path / "killed-once"
    result = train(DeadlyJob(**job.__dict__, marker=str(marker), at=20), killed)
    assert marker.exists()
    assert result["step"] == 30
    assert result["restarts"] == 1
    starts = [r for r in read_metrics(killed) if r.get("event") == "start"]
    assert [r["attempt"] for r in starts] == [1, 2]
    assert 8 <= starts[1]["step"] <= 20

    expected, found = read_digests(whole), read_digests(killed)
    assert len(expected) == 30 * 2
    assert found == expected
    left, right = (CheckpointStore(run, 99, 2).load(30) for run in (whole, killed))
    assert same_tensors(left.model, right.model)
    assert same_tensors(left.optimizer, right.optimizer)
    steps = [r["step"] for r in read_metrics(killed) if r["kind"] == "train"]
    assert steps == list(range(1, 31))


@pytest.mark.slow
def test_workers_start_again_where_the_model_can_not_be_written(ray_session, corpus, tmp_path):
    """The driver hears why; once the storage is mended the run ends as it would have."""
    settings = {"workers": 2, "deterministic": True, "collective_timeout_s": 40}
    job = pretrain_job(corpus, {"dropout": 0.1}, **settings)
    whole, hindered = Folder(tmp_path / "whole"), Folder(tmp_path / "hindered")
    train(job, whole)
    hindered.write_text("model", "a file where a folder should be")
    told = []

    def mend(record):
        if record.get("event") == "storage":
            told.append(record["message"])
            if "start again" in told[-1]:
                hindered.delete("model")

    from raybert.train.worker import train_on_ray

    result = train_on_ray(job, hindered, RESOURCES, on_progress=mend)
    assert (result["step"], result["restarts"]) == (4, 1)
    assert ["start again" in text for text in told] == [False, True]
    assert "the checkpoint of step 4 is whole" in told[1]
    left, right = ((run / "model").read_bytes("model.safetensors") for run in (whole, hindered))
    assert left == right


def test_two_workers_train_on_an_object_store(ray_session, bucket):
    """Theirs, and what Ray Train keeps for itself."""
    make_corpus(bucket / "corpus", documents=400)
    job = pretrain_job(bucket / "corpus", steps=6, workers=2, checkpoint_steps=2)
    run = bucket / "run"
    result = train(job, run)
    assert result == run.read_json("result.json")
    assert CheckpointStore(run, 99, 2).load(6).step == result["step"] == 6
    assert [r["step"] for r in read_metrics(run) if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert (run / "model").exists("model.safetensors")
    assert not run.exists("ray")


def test_two_workers_read_the_batches_of_one(ray_session, corpus, tmp_path):
    job = pretrain_job(corpus, steps=6, digests=True, workers=2)
    together = Folder(tmp_path / "ray")
    seen = []
    from raybert.train.worker import train_on_ray

    result = train_on_ray(job, together, RESOURCES, on_progress=seen.append)
    alone = Folder(tmp_path / "bare")
    bare = execute_bare(job, alone, on_progress=lambda record: None)
    assert read_digests(together) == read_digests(alone)
    assert result["step"] == bare["step"] == 6
    assert result["loss"] == pytest.approx(bare["loss"], abs=1e-3)
    assert result["tokens"] == bare["tokens"]
    assert [r["step"] for r in seen if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert (together / "model").exists("model.safetensors")
    assert not together.exists("ray")  # what Ray Train keeps for itself is gone


def test_a_task_on_ray_gives_what_a_bare_task_gives(ray_session, corpus):
    job = pretrain_job(corpus, steps=5)
    bare = job.make_task(Group(), Feed()).batches(0, 5)
    on_ray = job.make_task(Group(), Feed(on_ray=True, cpus=1)).batches(0, 5)
    for _ in range(5):
        assert digests([next(bare)]) == digests([next(on_ray)])
    on_ray.close()
