"""Checks of a cluster: pure functions of node reports, the probes, and a run on a real Ray."""

import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybert.cluster.session import Resources
from raybert.config import build
from raybert.errors import ConfigError, UserError
from raybert.experiment import Experiment
from raybert.jobs.doctor import all_reduce, checks, nodes, run_checks
from raybert.jobs.doctor.all_reduce import AllReduceResult, spread
from raybert.jobs.doctor.nodes import MISSING, NodeReport
from raybert.storage.folder import Folder
from raybert.tasks.settings import PretrainConfig
from raybert.terminal.display import Display
from raybert.train.ray.placement import check_resources, uses_gpus

VERSIONS = {"raybert": "0.1.0", "ray": "2.60.0", "torch": "2.13.0+cpu", "tokenizers": "0.21",
            "pyarrow": "17.0", "python": "3.11.9"}  # fmt: skip


def node(name, **more):
    values = {"cpus": 4, "object_store": 1 << 30, "shared_memory": 1 << 32, "token": "private"}
    return NodeReport(
        id=name, name=name, **{**values, "versions": VERSIONS, "clock_offset": 0.0, **more}
    )


def of_version(name, **versions):
    return node(name, versions={**VERSIONS, **versions})


# Checks ------------------------------------------------------------------------------------------


def test_nodes_that_cannot_run_raybert_are_named():
    found = checks.check_nodes([node("a"), node("b", error="No module named 'raybert'")])
    assert found.status == "problem"
    assert found.message == "b can't run raybert: No module named 'raybert'"
    many = [node(f"n{i}", gpus=8, gpu="H100") for i in range(9)]
    fine = checks.check_nodes(many)
    assert fine.status == "ok"
    assert fine.message == (
        "9 nodes, 36 CPUs, 72 GPUs (H100): n0 4 + 8, n1 4 + 8, n2 4 + 8 and 6 more"
    )


@pytest.mark.parametrize("package", ["raybert", "ray", "torch", "python"])
def test_nodes_must_have_the_same_versions(package):
    found = checks.check_versions([node("a"), node("b"), of_version("c", **{package: "9"})], None)
    assert found.status == "problem"
    here = {**VERSIONS, "torch": "2.13.0", "python": "3.11"}[package]
    assert found.message == f"{package} differs: {here} on a, b, 9 on c"


def test_builds_and_patch_releases_may_differ():
    other = of_version("b", torch="2.13.0+cu128", python="3.11.2")
    found = checks.check_versions([node("a"), other], VERSIONS)
    assert found.status == "ok"
    assert found.message == "raybert 0.1.0, ray 2.60.0, torch 2.13.0, python 3.11 on 2 nodes"


@pytest.mark.parametrize("package", sorted(VERSIONS))
def test_a_package_missing_on_a_node_is_a_problem(package):
    found = checks.check_versions([node("a"), of_version("b", **{package: MISSING})], None)
    assert (found.status, found.message) == ("problem", f"{package} is missing on b")


def test_another_version_on_the_submitting_machine_is_a_warning():
    found = checks.check_versions([node("a")], {**VERSIONS, "ray": "2.55.0"})
    assert found.status == "warning"
    assert found.message.startswith(
        "ray is 2.60.0 on the cluster and 2.55.0 on the submitting machine"
    )


def test_shared_memory_below_the_object_store_is_a_warning():
    small = node("a", object_store=2_000_000_000, shared_memory=64_000_000)
    found = checks.check_memory([small, node("b")])
    assert found.status == "warning"
    assert found.message.startswith("a: 64 MB in /dev/shm for an object store of 2.0 GB")
    assert checks.check_memory([node("a"), node("b", shared_memory=None)]).status == "ok"


def test_a_different_folder_on_each_node_is_a_problem():
    found = checks.check_storage([node("a", unseen=("b", "c")), node("b", unseen=("a", "c"))], "/r")
    assert found.status == "problem"
    assert (
        found.message
        == "a does not see the files of b, c in /r: it is not the same folder on every node"
    )
    assert "s3://bucket/runs" in found.remedy


def test_a_storage_that_a_node_cannot_write_is_a_problem():
    found = checks.check_storage([node("a"), node("b", storage_error="Access Denied")], "s3://b/r")
    assert (found.status, found.message) == ("problem", "b can't use it: Access Denied")
    assert checks.check_storage([node("a"), node("b")], "/r").status == "ok"


@given(
    free=st.lists(st.none() | st.integers(0, 10**12), min_size=1, max_size=5),
    needed=st.none() | st.integers(0, 10**12),
)
def test_the_least_free_space_of_all_nodes_counts(free, needed):
    on = [node(str(i), free=count) for i, count in enumerate(free)]
    found = checks.check_space(on, "/r", needed)
    known = [count for count in free if count is not None]
    lacks = bool(known) and needed is not None and min(known) < needed
    assert found.status == ("problem" if lacks else "ok")
    assert known or "is unknown" in found.message
    assert needed is not None or "not known" in found.message


@given(
    cpus=st.integers(0, 40),
    gpus=st.integers(0, 9),
    workers=st.integers(1, 8),
    gpu=st.sampled_from(["auto", "yes", "no"]),
    started_here=st.booleans(),
)
def test_the_check_of_workers_agrees_with_training(cpus, gpus, workers, gpu, started_here):
    config = build(PretrainConfig, {"workers": workers, "gpu": gpu}, "x")
    has = Resources(cpus, gpus, 1 << 30, started_here)
    found = checks.check_workers(config, has)
    try:
        check_resources(config, uses_gpus(config, gpus), has)
    except ConfigError as refused:
        assert (found.status, found.line) == ("problem", str(refused))
    else:
        starved = not started_here and cpus < 2 * workers
        assert found.status == ("warning" if starved else "ok")


def test_a_failed_slow_or_skipped_all_reduce_is_reported():
    of = checks.check_all_reduce
    assert of(AllReduceResult("gloo", 2, 2, seconds=0.5)).status == "ok"
    slow = of(AllReduceResult("gloo", 2, 2, seconds=20.0))
    assert (slow.status, "GLOO_SOCKET_IFNAME" in slow.remedy) == ("warning", True)
    failed = of(AllReduceResult("nccl", 16, 2, error="Connection refused"))
    assert failed.status == "problem"
    assert failed.message == "16 processes on 2 nodes failed (nccl): Connection refused"
    assert "NCCL_SOCKET_IFNAME" in failed.remedy
    assert of(AllReduceResult("nccl", 1, is_busy=True)).status == "warning"


def test_clocks_are_compared():
    assert checks.check_clocks(
        [node("a"), node("b", clock_offset=0.5), node("c", clock_offset=None)]
    ).message == ("at most 500 ms apart")
    found = checks.check_clocks([node("a"), node("b", clock_offset=-35.0)])
    assert (found.status, found.message) == ("warning", "b: 35.0 s behind")


def test_a_missing_or_readable_token_is_a_warning():
    off = checks.check_token([node("a")], is_on=False)
    assert off.status == "warning"
    assert "ray get-auth-token --generate" in off.remedy and "chmod 600" in off.remedy
    assert checks.check_token([node("a"), node("b", token="open")], True).status == "warning"
    closed = checks.check_token([node("a"), node("b", token="closed")], True)
    assert (closed.status, "on b: the mode is 0600 now" in closed.message) == ("ok", True)
    assert checks.check_token([node("a"), node("b", token="none")], True).status == "ok"


@given(
    slots=st.dictionaries(st.text(max_size=3), st.integers(0, 9), max_size=6),
    count=st.integers(0, 40),
)
def test_processes_are_assigned_round_robin_within_the_free_slots(slots, count):
    chosen = spread(slots, count)
    assert len(chosen) == min(count, sum(slots.values()))
    assigned = {name: chosen.count(name) for name in slots}
    assert all(assigned[name] <= slots[name] for name in slots)
    most = max(assigned.values(), default=0)
    assert all(assigned[name] >= most - 1 for name in slots if assigned[name] < slots[name])


# Probes on a node --------------------------------------------------------------------------------


def test_a_probe_finds_the_files_of_others_and_deletes_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "_VISIBLE_SECONDS", 0.1)
    probe, storage = nodes._Probe(), str(tmp_path)
    reason, free = probe.write(storage, ".x", "one")
    assert reason == "" and free > 0
    assert probe.find_unseen(storage, ".x", ["one", "two"]) == ["two"]
    Folder(tmp_path).write_text(".x/two", "another's")
    assert probe.find_unseen(storage, ".x", ["one", "two"]) == ["two"]
    probe.write(storage, ".x", "two")
    assert probe.find_unseen(storage, ".x", ["one", "two"]) == []
    probe.clean(storage, ".x")
    probe.clean(storage, ".x")
    assert os.listdir(tmp_path) == []


def test_a_probe_returns_why_it_cannot_write(tmp_path):
    (tmp_path / "file").touch()
    reason, free = nodes._Probe().write(str(tmp_path / "file"), ".x", "one")
    assert "Not a directory" in reason
    assert free is None


def test_an_all_reduce_with_a_missing_process_times_out(monkeypatch):
    monkeypatch.setattr(all_reduce, "_TIMEOUT_SECONDS", 1.0)
    process = all_reduce._Process()
    address = process.open_store(2)
    with pytest.raises(RuntimeError, match="(?i)time"):
        process.all_reduce(address, 0, 2, "gloo")


# A real Ray --------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({"run": {"name": "mine", "storage": str(tmp_path / "runs")}}))
    return path


NAMES = ["nodes", "versions", "memory", "storage", "space", "pretrain workers", "finetune workers",
         "all-reduce", "clocks", "token"]  # fmt: skip


@pytest.mark.ray
@pytest.mark.slow
def test_all_checks_pass_on_a_local_ray(raybert, ray_session, config, tmp_path):
    done = raybert("doctor", "-c", config, "--json")
    assert done.code == 0, done.err
    found = {one["name"]: one for one in done.json["findings"]}
    assert list(found) == NAMES
    assert done.json["problem"] is None
    # /dev/shm is small in some containers.
    assert {one["status"] for name, one in found.items() if name != "memory"} == {"ok"}, found
    assert "2 processes on 1 node took" in found["all-reduce"]["message"]
    assert f"1 node can write and read {tmp_path}/runs" in found["storage"]["message"]
    assert found["token"]["message"].startswith("on")
    assert os.listdir(tmp_path / "runs") == []
    assert len([line for line in done.err.splitlines() if line.startswith("ok ")]) >= 9


@pytest.mark.ray
@pytest.mark.slow
def test_a_problem_is_the_last_line_and_exits_with_2(raybert, ray_session, config, tmp_path):
    (tmp_path / "file").touch()
    storage = f"run.storage={tmp_path}/file/runs"
    done = raybert("doctor", "-c", config, "--json", "--set", storage)
    assert done.code == 2
    last = done.err.splitlines()[-1]
    assert " can't use it: " in last
    assert "choose another run.storage" in last
    assert last == f"raybert: {done.json['problem']}"
    statuses = {one["name"]: one["status"] for one in done.json["findings"]}
    assert [name for name, status in statuses.items() if status == "problem"] == ["storage"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_submitted_job_is_checked_once(ray_session, tmp_path, monkeypatch, capsys):
    experiment = build(Experiment, {"run": {"storage": str(tmp_path)}}, "test")
    has = Resources(cpus=4, gpus=0, object_store=1 << 30, started_here=True)
    found = run_checks.check_cluster(experiment, has, Display(quiet=True), ("pretrain",))
    calls = []

    def check_cluster(experiment, resources, display, stages):
        """Return the earlier results, with workers checked against the given resources."""
        calls.append(stages)
        here = [checks.check_workers(getattr(experiment, stage), resources) for stage in stages]
        return [next((h for h in here if h.name == one.name), one) for one in found]

    monkeypatch.setattr(run_checks, "check_cluster", check_cluster)
    for name, value in run_checks.check_request().items():
        monkeypatch.setenv(name, value)
    run_checks.run_requested_checks(experiment, has, Display(), ("pretrain",))
    assert "no problem in 9 checks" in capsys.readouterr().err
    run_checks.run_requested_checks(experiment, has, Display(), ("pretrain",))
    assert capsys.readouterr().err == ""
    assert calls == [("pretrain",)]

    for name, value in run_checks.check_request().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"leave no CPU .*; lower it to 1 .*--no-check"):
        run_checks.run_requested_checks(
            experiment, Resources(1, 0, 1 << 30, False), Display(), ("pretrain",)
        )


@pytest.mark.ray
@pytest.mark.slow
def test_an_unreachable_node_is_reported_as_an_error(ray_session, tmp_path):
    there = nodes.alive_nodes()
    gone = NodeReport(id="a" * 56, name="gone")
    nodes.probe_nodes([*there, gone], str(tmp_path), lambda line: None)
    assert [node.error == "" for node in there] == [True]
    assert gone.error
    assert there[0].unseen == () and there[0].versions == nodes.versions()
    assert abs(there[0].clock_offset) < 5
    assert Path(tmp_path).exists() and os.listdir(tmp_path) == []


def test_the_checks_are_repeated_when_a_node_dies_during_them(tmp_path, monkeypatch):
    """Ray lists it for some seconds more; a node that stays and does not answer is a problem."""
    looks = []

    def alive_nodes():
        looks.append(1)
        return [node("a"), node("b")] if len(looks) == 1 else [node("a")]

    def probe_nodes(there, storage, log):
        for one in there:
            one.error = "the actor died" if one.name == "b" else ""

    monkeypatch.setattr(run_checks, "alive_nodes", alive_nodes)
    monkeypatch.setattr(run_checks, "probe_nodes", probe_nodes)
    monkeypatch.setattr(all_reduce, "start_processes", lambda *given: nullcontext([]))
    monkeypatch.setattr(
        all_reduce, "run_all_reduce", lambda *given: AllReduceResult("gloo", 2, 1, seconds=0.1)
    )
    experiment = build(Experiment, {"run": {"storage": str(tmp_path)}}, "test")
    has = Resources(cpus=4, gpus=0, object_store=1 << 30, started_here=True)

    def found():
        one, *_ = run_checks.check_cluster(experiment, has, Display(quiet=True), ("pretrain",))
        return one

    assert (found().status, len(looks)) == ("ok", 4)
    monkeypatch.setattr(run_checks, "alive_nodes", lambda: [node("a"), node("b")])
    assert found().status == "problem"
