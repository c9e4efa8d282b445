"""Prometheus metrics: every record's values under their names, and none that is undefined."""

import math
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import Attempt, Scripted, make_corpus, pretrain_job

from raybert.cluster.session import Resources
from raybert.errors import StorageError
from raybert.storage.folder import Folder
from raybert.tasks.masked_lm import MaskedLMTask, PretrainSpec
from raybert.train.metrics_log import read_metrics
from raybert.train.ray import prometheus as module
from raybert.train.ray.prometheus import COUNTERS, GAUGES, PrometheusExporter, gauge_values

TRAIN = {
    "kind": "train",
    "step": 20,
    "loss": 3.5,
    "lr": 1e-3,
    "grad_norm": 0.75,
    "tokens_per_second": 1000.0,
    "step_seconds": 0.5,
    "data_wait": 0.125,
    "mfu": 0.25,
    "total_steps": 100,
    "data_wait_max": 0.25,
    "data_wait_rank": 1,
    "own_seconds": 0.3,
    "own_seconds_max": 0.4,
    "own_seconds_rank": 2,
}
_SHARE = {"kind", "step_seconds", "data_wait", "data_wait_max"}
EXPORTED = {f"ray_raybert_{name}" for name in GAUGES} | {
    f"ray_raybert_{name}_total" for name in COUNTERS
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("exporter")) / "corpus"
    make_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def exporter():
    with closing(PrometheusExporter(Folder("/runs/experiment/stage"), 1, 1)) as made:
        yield made


def values(record):
    return {name: value for (name, _), value in gauge_values(record).items()}


def test_a_train_record_sets_the_gauges_of_its_keys():
    found = values(TRAIN)
    assert found.pop("data_wait_share") == 0.5  # of the rank that waits longest
    assert found == {name: TRAIN[name] for name in found}
    assert found.keys() == TRAIN.keys() - {"kind", "data_wait", "data_wait_max"}
    old = {key: value for key, value in TRAIN.items() if key != "data_wait_max"}
    assert values(old)["data_wait_share"] == 0.25


def test_an_evaluation_is_labelled_with_its_measure():
    record = {"kind": "eval", "step": 9, "loss": 0.5, "accuracy": 0.875, "score": 0.875}
    scores = {("heldout", "loss"): 0.5, ("heldout", "score"): 0.875}
    assert gauge_values(record) == {**scores, ("heldout", "accuracy"): 0.875}
    del record["accuracy"]
    assert gauge_values(record) == scores


@given(st.sets(st.sampled_from(sorted(TRAIN.keys() - _SHARE))))
def test_only_undefined_values_are_left_out(undefined):
    for value in (None, math.nan, math.inf, -math.inf):
        found = values({**TRAIN, **dict.fromkeys(undefined, value)})
        assert found.keys() == values(TRAIN).keys() - undefined


def test_every_value_has_a_gauge():
    saved = {"kind": "checkpoint", "step": 1, "stalled": 0.1, "written": 2.0, "bytes": 3}
    evaluation = {"kind": "eval", "step": 1, "loss": 1.0, "accuracy": 1.0}
    for record in (TRAIN, evaluation, saved):
        assert values(record)
        assert values(record).keys() <= GAUGES.keys()


@given(
    st.dictionaries(
        st.sampled_from([*TRAIN, "event", "stalled", "written", "bytes"]),
        st.none() | st.floats() | st.text(max_size=3) | st.sampled_from(["train", "checkpoint"]),
    )
)
def test_no_record_raises(exporter, record):
    exporter.report(record)


def test_skipped_steps_and_failed_checkpoints_are_counted(corpus, tmp_path, monkeypatch):
    """With the names that the loop gives to these events."""
    run = Folder(tmp_path) / "run"
    job = pretrain_job(corpus, steps=6, checkpoint_steps=2)
    attempt = Attempt(
        job,
        run,
        change=lambda task: Scripted(task, factor=lambda b: math.inf if b.step in (1, 4) else 1.0),
    )
    write = attempt.store._write

    def fails_at_2(snapshot):
        if snapshot.step == 2:
            raise StorageError("writing it failed: No space left on device")
        write(snapshot)

    monkeypatch.setattr(attempt.store, "_write", fails_at_2)
    attempt.run()
    with closing(PrometheusExporter(run, 1, 1)) as exporter:
        for record in attempt.records:
            exporter.report(record)
    assert exporter._values["skipped_steps", ""] == 2
    assert exporter._values["checkpoint_failures", ""] == 1


def test_gauges_are_exported_repeatedly_until_the_run_ends(monkeypatch):
    """Ray drops a gauge once it has been collected."""
    exported = []

    class Recorder:
        def set(self, value, labels):
            exported.append(value)

    monkeypatch.setattr(module, "_SECONDS", 0.01)
    with closing(PrometheusExporter(Folder("/runs/experiment/stage"), 1, 3)) as exporter:
        exporter._gauges["workers"] = Recorder()
        ends = time.monotonic() + 20
        while len(exported) < 3 and time.monotonic() < ends:
            time.sleep(0.01)
    assert len(exported) >= 3 and set(exported) == {3}
    assert not exporter._thread.is_alive()


# On Ray ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ObservedJob(PretrainSpec):
    """Skips a step, on devices of a known peak, and ends only after a test has read its metrics."""

    marker: str = ""

    def make_task(self, group, feed):
        from raybert.train import loop

        loop.peak_flops = lambda device: 1e10  # in the worker's process
        return ObservedTask(self, group, feed)

    def finish(self, task, run, metrics):
        ends = time.monotonic() + 120
        while not Path(self.marker).exists() and time.monotonic() < ends:
            time.sleep(0.1)
        return super().finish(task, run, metrics)


class ObservedTask(MaskedLMTask):
    def loss(self, module, batch):
        return super().loss(module, batch) * (math.inf if batch.step == 1 else 1.0)


@pytest.fixture
def importable():
    """Workers unpickle what is defined here."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def scrape(address, run):
    """A run's metrics as a node's agent exports them: {name: value}."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    return {s.name: s.value for s in samples if s.labels.get("run") == run}


def logged(run):
    """The metrics that the run's own log implies."""
    records = read_metrics(run)
    last = {record["kind"]: record for record in records}
    saved = [record for record in records if record["kind"] == "checkpoint"]
    if not saved or saved[-1]["step"] != 6:
        return None  # not finished yet
    train = last["train"]
    return {
        **{f"ray_raybert_{name}": value for name, value in values(train).items()},
        "ray_raybert_heldout": last["eval"]["loss"],
        "ray_raybert_workers": 2,
        "ray_raybert_restarts": 0,
        "ray_raybert_skipped_steps": 1,
        "ray_raybert_checkpoint_failures": 0,
        "ray_raybert_checkpoint_stalled_seconds": saved[-1]["stalled"],
        "ray_raybert_checkpoint_written_seconds": saved[-1]["written"],
        "ray_raybert_checkpoint_bytes": saved[-1]["bytes"],
        "ray_raybert_stalled_seconds_total": pytest.approx(sum(r["stalled"] for r in saved)),
    }


@pytest.mark.slow  # Ray exports every ten seconds, and each worker's metrics come late
@pytest.mark.ray
def test_a_node_exports_what_the_run_has_logged(ray_session, importable, corpus, tmp_path):
    from raybert.train.ray.driver import train_on_ray

    begun = time.time()
    run, marker = Folder(tmp_path / "imdb" / "pretrain"), tmp_path / "looked"
    job = pretrain_job(corpus, steps=6, checkpoint_steps=2, evaluations=2, workers=2)
    job = ObservedJob(**job.__dict__, marker=str(marker))
    resources = Resources(cpus=4, gpus=0, object_store=512 << 20, started_here=True)
    [node] = ray_session.nodes()
    address = f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train_on_ray, job, run, resources)
        try:
            found, times, expected, ends = {}, [], None, time.monotonic() + 120
            while time.monotonic() < ends and not training.done():
                expected = logged(run)
                found = scrape(address, "imdb/pretrain")
                times = [found.pop(name, 0) for name in sorted(found) if "timestamp" in name]
                if expected is not None and found == expected:
                    break
                time.sleep(1)
        finally:
            marker.touch()
        assert training.result()["step"] == 6
    assert found == expected
    assert len(times) == 2 and all(begun < at < time.time() for at in times)
    assert len(found) + len(times) == len(EXPORTED)
    assert found.keys() <= EXPORTED
