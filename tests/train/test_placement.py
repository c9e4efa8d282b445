"""Placement: the CPUs of the data pipelines, and clusters that are too small."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybert.cluster.session import Resources
from raybert.config import build
from raybert.errors import ConfigError
from raybert.tasks.settings import FinetuneConfig, PretrainConfig
from raybert.train.ray.placement import check_resources, format_shortage, operator_cpus


def resources(cpus, gpus=0, started_here=True):
    return Resources(cpus=cpus, gpus=gpus, object_store=1 << 30, started_here=started_here)


@given(
    free=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any),
    workers=st.integers(1, 100),
    gpu=st.booleans(),
)
def test_all_workers_operators_fit_beside_each_other(free, workers, gpu):
    """On whichever nodes the free CPUs are: a worker that waits for one stops all others."""
    cpus = operator_cpus(sum(free), workers, gpu)
    task = min(1, cpus)
    fitting = sum(int(node / task + 1e-9) for node in free)
    assert fitting >= workers * int(max(1, cpus))
    assert 0 < cpus <= (2 if gpu else 1)


@pytest.mark.parametrize(
    ("config", "gpu", "have", "words"),
    [
        (
            build(PretrainConfig, {"workers": 3}, "x"),
            False,
            resources(3),
            "pretrain.workers=3 leave no CPU for Ray Data's operators: the cluster has 3; "
            "lower it to 2 or add a node",
        ),
        (
            build(FinetuneConfig, {"workers": 2, "gpu": "yes"}, "x"),
            True,
            resources(64, gpus=1),
            "finetune.workers=2 with finetune.gpu=yes need 2 GPUs, the cluster has 1; "
            "lower finetune.workers or set finetune.gpu=no",
        ),
        (
            build(PretrainConfig, {"workers": {"min": 4, "max": 8}}, "x"),
            False,
            resources(4),
            "pretrain.workers.min=4 leave no CPU for Ray Data's operators: the cluster has 4; "
            "lower it to 3 or add a node",
        ),
    ],
)
def test_a_cluster_that_is_too_small_is_refused(config, gpu, have, words):
    with pytest.raises(ConfigError) as refused:
        check_resources(config, gpu, have)
    assert str(refused.value) == words
    check_resources(config, gpu, resources(65, gpus=4))


@pytest.mark.parametrize(
    ("gpu", "free", "words"),
    [
        (False, {"CPU": 3.0}, None),
        (False, {"CPU": 2.0}, "waiting for 3 CPUs: 2 workers need a CPU each, Ray Data one "
                              "CPU, and 2 of 8 CPUs are free; other jobs have the rest"),
        (False, {}, "and 0 of 8 CPUs are free"),
        (True, {"CPU": 8.0, "GPU": 1.0}, "waiting for 2 GPUs: 2 workers need a GPU each, Ray Data "
                                         "one CPU, and 1 of 4 GPUs are free"),
        (True, {"GPU": 1.0}, "waiting for 3 CPUs and 2 GPUs: "),
    ],
)  # fmt: skip
def test_what_a_run_waits_for_is_named_by_what_is_free(gpu, free, words):
    config = build(PretrainConfig, {"workers": {"min": 2, "max": 4}}, "x")
    found = format_shortage(config, gpu, {"CPU": 8.0, "GPU": 4.0}, free)
    assert found == words if words is None else words in found


def test_a_range_of_workers_waits_for_nodes_of_an_autoscaler():
    config = build(PretrainConfig, {"workers": {"min": 4, "max": 8}, "gpu": "yes"}, "x")
    check_resources(config, True, resources(1, started_here=False))


@pytest.mark.ray
def test_without_a_dashboard_no_process_tracks_the_state_of_training(ray_session):
    """Every process of a Ray that was started for a command takes time from the training."""
    assert "RAY_TRAIN_ENABLE_STATE_TRACKING" not in os.environ
