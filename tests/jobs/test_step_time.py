"""Laws of the model of step time, and what `raybert estimate` says for a configuration."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
from commands import run_here
from hypothesis import given
from hypothesis import strategies as st

from raybert.config import build
from raybert.errors import UserError
from raybert.experiment import Experiment
from raybert.jobs.scaling import estimate_on, machines_of, work_of
from raybert.jobs.step_time import REMEDIES, Machines, Work, best_interval, step_time

FASTER = ("flops", "node_bandwidth", "network_bandwidth", "input_rate", "hours_between_failures")

works = st.builds(
    Work,
    flops=st.floats(1e12, 1e18),
    tokens=st.floats(1e3, 1e8),
    parameters=st.integers(10**6, 10**10),
    micro_batches=st.integers(1, 5000),
    gradient_bytes=st.sampled_from([2, 4]),
    sharding=st.sampled_from(["none", "optimizer", "full"]),
    recomputes=st.booleans(),
)
clusters = st.builds(
    Machines,
    gpus=st.integers(1, 2048),
    gpus_per_node=st.sampled_from([1, 4, 8]),
    flops=st.floats(1e12, 1e15),
    node_bandwidth=st.floats(1e9, 1e12),
    network_bandwidth=st.floats(1e8, 1e12),
    input_rate=st.floats(1e4, 1e9),
)


@given(works, clusters, st.sampled_from(FASTER), st.floats(1, 100))
def test_what_is_faster_never_takes_longer(work, machines, what, factor):
    faster = dataclasses.replace(machines, **{what: factor * getattr(machines, what)})
    before, after = step_time(work, machines), step_time(work, faster)
    assert after.seconds <= before.seconds * (1 + 1e-9)
    assert after.failing <= before.failing


@given(works, clusters)
def test_a_step_takes_at_least_its_computing_and_at_most_all_parts_in_a_row(work, machines):
    found = step_time(work, machines)
    factor = 4 / 3 if work.recomputes else 1
    least = factor * work.flops / (machines.gpus * machines.flops)
    assert found.seconds >= least * (1 - 1e-9)
    assert found.compute - found.idle == pytest.approx(least)
    assert 0 <= found.exposed <= found.communication * (1 + 1e-9)
    in_a_row = found.compute + found.communication + found.fixed + found.input
    assert found.seconds <= in_a_row * (1 + 1e-9)
    assert 0 <= found.efficiency <= 1
    assert found.limit in REMEDIES


@given(works, clusters)
def test_without_limits_of_the_network_computing_is_all_that_is_left(work, machines):
    free = dataclasses.replace(
        machines,
        node_bandwidth=math.inf,
        network_bandwidth=math.inf,
        latency=0.0,
        fixed=0.0,
        input_rate=math.inf,
    )
    assert step_time(work, free).seconds == pytest.approx(step_time(work, free).compute)


@given(works, clusters)
def test_a_gpu_alone_sends_nothing(work, machines):
    alone = dataclasses.replace(machines, gpus=1)
    found = step_time(work, alone)
    assert found.communication == found.exposed == found.idle == 0


@given(works, clusters)
def test_fewer_bytes_are_never_slower(work, machines):
    half = dataclasses.replace(work, gradient_bytes=2)
    whole = dataclasses.replace(work, gradient_bytes=4)
    assert step_time(half, machines).communication <= step_time(whole, machines).communication
    by = {
        kind: step_time(dataclasses.replace(whole, sharding=kind), machines).communication
        for kind in ("none", "optimizer", "full")
    }
    assert by["none"] == pytest.approx(by["optimizer"])  # an all-reduce is both of its halves
    assert by["full"] >= by["optimizer"] * (1 - 1e-9)


@given(works, clusters, st.floats(0.2, 5))
def test_no_other_interval_loses_less_than_the_best_one(work, machines, factor):
    fast = dataclasses.replace(machines, storage_bandwidth=math.inf)
    best = best_interval(work, fast)

    def lost(seconds):
        found = step_time(dataclasses.replace(work, checkpoint_seconds=seconds), fast)
        return found.saving + found.failing

    if lost(best) < 0.5:  # shares end at 1
        assert lost(best) <= lost(factor * best) * (1 + 1e-9)


# A configuration ---------------------------------------------------------------------------------


def experiment_of(**pretrain):
    values = {"run": {"storage": "/nonexistent"}, "pretrain": {"steps": 100, **pretrain}}
    return build(Experiment, {**values, "model": {"size": "base"}}, "test")


def test_an_estimate_says_what_a_step_takes_and_what_limits_it():
    found = estimate_on(experiment_of(global_batch_size=4096), "pretrain", 64, 8, "H100", 3200)
    assert (found["gpus"], found["nodes"]) == (64, 8)
    assert found["run_seconds"] >= 100 * found["seconds"]
    first, step, limit, failures, run = found["lines"]
    assert "parameters" in first
    assert "on 64 GPUs in 8 nodes" in step
    assert limit == f"what costs most: {REMEDIES[found['limit']]}"
    assert "a failure every 32 d" in failures
    assert run.startswith("100 steps take about ")


def test_settings_change_the_work():
    plain = work_of(experiment_of(), "pretrain")
    changed = experiment_of(
        gradients="bf16", sharding="full", activation_checkpointing=True, checkpoint_minutes=None
    )
    work = work_of(changed, "pretrain")
    assert (work.gradient_bytes, work.sharding, work.recomputes) == (2, "full", True)
    assert (plain.gradient_bytes, plain.sharding, plain.recomputes) == (4, "none", False)
    assert (plain.checkpoint_seconds, work.checkpoint_seconds) == (300, None)


def test_gpus_beyond_the_micro_batches_are_said_to_be_idle():
    few = experiment_of(global_batch_size=64, micro_batch_size=32)
    found = estimate_on(few, "pretrain", 8, 8, "A100", 800)
    assert found["limit"] == "idle"
    assert "6 GPUs have nothing to do: a step has 2 micro-batches" in found["lines"]


@pytest.mark.parametrize(
    ("stage", "gpu", "words"),
    [("corpus", "H100", "choose pretrain or finetune"), ("pretrain", "H20x", "choose one of")],
)
def test_what_is_unknown_is_named(stage, gpu, words):
    with pytest.raises(UserError, match=words):
        estimate_on(experiment_of(), stage, 8, 8, gpu, 3200)


def test_a_node_without_nvlink_is_slower_inside():
    for slow, fast in (("L40S", "H100"), ("H100 PCIe", "H100"), ("A100", "H100"), ("T4", "A100")):
        bandwidths = [machines_of(8, 8, gpu, 100).node_bandwidth for gpu in (slow, fast)]
        assert bandwidths[0] < bandwidths[1]


def test_the_documented_command_gives_the_documented_step(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    command = re.search(r"^raybert (.*)$", page, re.MULTILINE)[1].split()
    monkeypatch.chdir(tmp_path)
    changes = (
        "corpus.seq_len=512",
        "pretrain.global_batch_size=4096",
        "pretrain.micro_batch_size=32",
    )
    wanted = [*command, *(f"--set={change}" for change in changes)]
    found = run_here([*wanted, "--json"], b"", capsys, monkeypatch)
    assert found.code == 0, found.err
    row = re.search(r"\| base, 3,200 Gb/s a node \|(.*)\|", page)[1].split("|")[1]
    said = re.search(r"(\d+) ms, (\d+)%", row)
    assert found.json["micro_batches"] == 128
    assert round(1000 * found.json["seconds"]) == int(said[1])
    assert round(100 * found.json["efficiency"]) == int(said[2])
    plain = run_here(command, b"", capsys, monkeypatch)
    assert "what costs most: " in plain.out and "GPU-hours" in plain.out
