"""Training on Ray: equal batches for any number of workers, and a lost worker changes no result."""

import os
import signal
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from making import make_corpus, pretrain_job, same_tensors
from proxy import s3_uri

from raybert.cluster.session import Resources
from raybert.data.corpus.manifest import Manifest
from raybert.data.corpus.parts import PartReader
from raybert.data.loader import BatchPlan, ray_micro_batches
from raybert.data.masking import MaskingConfig, Vocabulary
from raybert.data.order import CorpusOrder, assign_to_ranks
from raybert.data.tokenizer import Tokenizer
from raybert.errors import ConfigError, RaybertError
from raybert.storage.exclusive import numbers_taken
from raybert.storage.folder import Folder
from raybert.tasks.masked_lm import MaskedLMTask, PretrainSpec
from raybert.train.checkpoint import CheckpointStore
from raybert.train.metrics_log import read_metrics
from raybert.train.run import train_in_process
from raybert.train.run_folder import read_digests

pytestmark = pytest.mark.ray

RESOURCES = Resources(cpus=4, gpus=0, object_store=512 << 20, started_here=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("on-ray")) / "corpus"
    make_corpus(folder, documents=400)
    return folder


@pytest.fixture(scope="module", autouse=True)
def importable():
    """Workers unpickle classes of this module."""
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
        order=CorpusOrder(reader.rows, reader.rows_per_group, 12, 3, seed=5),
        masking=MaskingConfig(mask_rate=0.3, mask_rate_end=0.1),
        vocabulary=Vocabulary(tokenizer.mask_id, tokenizer.is_special),
        total_steps=total_steps,
    )


def digests(stream):
    return [[(b.step, b.micro_batch_index, b.digest()) for b in batches] for batches in stream]


def test_batches_from_ray_data_equal_those_of_one_process(ray_session, corpus, monkeypatch):
    """For one worker and for three, from the middle of an epoch into the next ones."""
    monkeypatch.setattr("raybert.data.loader._MAX_TASKS", 2)  # fewer than windows: some share one
    plan = plan_of(corpus, 300)
    begin = plan.order.steps_per_epoch // 2
    steps = range(begin, begin + 2 * plan.order.steps_per_epoch + 3)
    expected = digests(plan.micro_batches(range(4), steps))
    assert len({d for step in expected for _, _, d in step}) == sum(map(len, expected))
    for world_size in (1, 3):
        merged = [[] for _ in steps]
        for indices in assign_to_ranks(4, world_size):
            made = digests(ray_micro_batches(plan, indices, steps, cpus=0.4, memory=64 << 20))
            assert len(made) == len(steps)
            for step, part in zip(merged, made, strict=True):
                step += part
        assert merged == expected


@dataclass(frozen=True)
class FatalJob(PretrainSpec):
    """Raises a user's error on one worker."""

    def make_task(self, group, feed):
        if group.rank == group.world_size - 1:
            raise ConfigError("pretrain.lr=7 is too much for the worker")
        return MaskedLMTask(self, group, feed)


@dataclass(frozen=True)
class DeadlyJob(PretrainSpec):
    """Kills its last worker with SIGKILL, once, before a given step."""

    marker: str = ""
    at: int = 0

    def make_task(self, group, feed):
        return DeadlyTask(self, group, feed)


class DeadlyTask(MaskedLMTask):
    def batches(self, first_step, total_steps):
        for batches in super().batches(first_step, total_steps):
            marker = Path(self._spec.marker)
            last = self._group.rank == self._group.world_size - 1
            if last and batches[0].step == self._spec.at and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield batches


def train(job, run):
    from raybert.train.ray.driver import train_on_ray

    return train_on_ray(job, run, RESOURCES)


@pytest.mark.slow
def test_a_workers_error_reaches_the_user_unchanged(ray_session, corpus, tmp_path):
    job = pretrain_job(corpus, workers=2)
    job = FatalJob(**job.__dict__)
    with pytest.raises(ConfigError, match="^pretrain.lr=7 is too much for the worker$"):
        train(job, Folder(tmp_path))


@dataclass(frozen=True)
class MisshapenJob(PretrainSpec):
    """Its second worker multiplies matrices that do not fit."""

    def make_task(self, group, feed):
        if group.rank == 1:
            torch.ones(2, 3) @ torch.ones(2, 3)
        return MaskedLMTask(self, group, feed)


@pytest.mark.slow
def test_an_error_of_the_program_is_not_tried_again(ray_session, corpus, tmp_path):
    job = MisshapenJob(**pretrain_job(corpus, workers=2).__dict__)
    with pytest.raises(RaybertError, match="mat1 and mat2 shapes cannot be multiplied"):
        train(job, Folder(tmp_path))
    assert len(numbers_taken(Folder(tmp_path) / "attempts")) == 1


@pytest.fixture(scope="module")
def together(ray_session, s3_server):
    """A run of two workers on S3: (its job, its folder, its records)."""
    bucket, records = Folder(s3_uri(s3_server, uuid.uuid4().hex[:8])), []
    make_corpus(bucket / "corpus", documents=400)
    job = pretrain_job(
        bucket / "corpus",
        {"dropout": 0.1},
        workers=2,
        steps=12,
        digests=True,
        deterministic=True,
        checkpoint_steps=4,
        evaluations=2,
        collective_timeout_s=30,
    )
    from raybert.train.ray.driver import train_on_ray

    train_on_ray(job, bucket / "run", RESOURCES, on_progress=records.append)
    return job, bucket / "run", records


def trained_steps(records):
    return [record["step"] for record in records if record["kind"] == "train"]


def test_two_workers_on_an_object_store_train_as_one_process(together, tmp_path):
    """The run's results are there, and no files of Ray Train's own."""
    job, run, records = together
    result, alone = run.read_json("result.json"), Folder(tmp_path)
    bare = train_in_process(job, alone, on_progress=lambda record: None)
    assert len(read_digests(alone)) == 12 * 2
    assert read_digests(run) == read_digests(alone)
    assert CheckpointStore(run, 99, 2).load(12).step == result["step"] == bare["step"] == 12
    assert result["loss"] == pytest.approx(bare["loss"], abs=1e-3)
    assert result["tokens"] == bare["tokens"]
    assert trained_steps(records) == trained_steps(read_metrics(run)) == list(range(1, 13))
    assert (run / "model").exists("model.safetensors")
    assert not run.exists("ray")


def test_a_killed_worker_does_not_change_the_result(together, tmp_path):
    (job, whole, _), killed, marker = together, Folder(tmp_path / "run"), tmp_path / "killed-once"
    result = train(DeadlyJob(**job.__dict__, marker=str(marker), at=9), killed)
    assert marker.exists()
    assert (result["step"], result["restarts"]) == (12, 1)
    starts = [r for r in read_metrics(killed) if r.get("event") == "start"]
    assert [r["attempt"] for r in starts] == [1, 2]
    assert 4 <= starts[1]["step"] <= 9
    assert read_digests(killed) == read_digests(whole)
    left, right = (CheckpointStore(run, 99, 2).load(12) for run in (whole, killed))
    assert same_tensors(left.model, right.model)
    assert same_tensors(left.optimizer, right.optimizer)
    assert trained_steps(read_metrics(killed)) == list(range(1, 13))


@pytest.mark.slow
def test_a_killed_worker_does_not_change_the_result_of_a_sharded_run(ray_session, corpus, tmp_path):
    settings = {"steps": 8, "checkpoint_steps": 3, "collective_timeout_s": 30}
    job = pretrain_job(
        corpus, {"dropout": 0.1}, workers=2, sharding="full", deterministic=True, **settings
    )
    whole, killed, marker = Folder(tmp_path / "whole"), Folder(tmp_path / "killed"), tmp_path / "m"
    bare = train_in_process(job, Folder(tmp_path / "bare"), on_progress=lambda record: None)
    results = [
        train(job, whole),
        train(DeadlyJob(**job.__dict__, marker=str(marker), at=5), killed),
    ]
    assert marker.exists()
    assert [result["restarts"] for result in results] == [0, 1]
    for result in results:
        assert result["loss"] == pytest.approx(bare["loss"], abs=1e-3)
    left, right = ((run / "model").read_bytes("model.safetensors") for run in (whole, killed))
    assert left == right


@pytest.mark.slow
def test_workers_restart_when_the_model_can_not_be_written(ray_session, corpus, tmp_path):
    """The driver reports why; once the storage works again the run ends as it would have."""
    settings = {"workers": 2, "deterministic": True, "collective_timeout_s": 20}
    job = pretrain_job(corpus, {"dropout": 0.1}, **settings)
    whole, hindered = Folder(tmp_path / "whole"), Folder(tmp_path / "hindered")
    train(job, whole)
    hindered.write_text("model", "a file where a folder should be")
    messages = []

    def mend(record):
        if record.get("event") in ("storage", "restart"):
            messages.append(record["message"])
            if record["event"] == "restart":
                hindered.delete("model")

    from raybert.train.ray.driver import train_on_ray

    result = train_on_ray(job, hindered, RESOURCES, on_progress=mend)
    assert (result["step"], result["restarts"]) == (4, 1)
    assert ["retrying for up to" in text for text in messages] == [True, False]
    assert "from the checkpoint of step 4: starting again from step 4" in messages[1]
    left, right = ((run / "model").read_bytes("model.safetensors") for run in (whole, hindered))
    assert left == right
