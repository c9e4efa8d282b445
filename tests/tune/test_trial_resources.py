"""The cluster is divided among trials, and a cluster without room for one is rejected."""

import pytest

from raybert.cluster.session import Resources
from raybert.errors import ConfigError
from raybert.tasks.settings import FinetuneConfig
from raybert.tune.settings import TuneConfig
from raybert.tune.trial_resources import TrialResources, trial_resources


def resources(cpus=10.0, gpus=0.0, started_here=False, nodes=()):
    return Resources(cpus, gpus, 1 << 30, started_here, nodes)


def training_of(workers):
    return FinetuneConfig.model_validate({"workers": workers, "micro_batch_size": 1})


def nodes(*each):
    return resources(sum(cpus for cpus, _ in each), sum(gpus for _, gpus in each), nodes=each)


@pytest.mark.parametrize(
    ("settings", "workers", "gpu", "cluster", "expected"),
    [
        ({}, 1, False, resources(10), TrialResources(10, 1.0, 0.0)),
        ({}, 1, False, resources(4, started_here=True), TrialResources(2, 1.0, 0.0)),
        ({"cpus_per_trial": 0.5}, 1, False, resources(4), TrialResources(8, 0.5, 0.0)),
        ({"concurrency": 3}, 1, False, resources(10), TrialResources(3, 1.0, 0.0)),
        ({"concurrency": 30}, 1, False, resources(10), TrialResources(10, 1.0, 0.0)),
        ({}, 1, True, resources(10, 4), TrialResources(4, 1.0, 1.0)),
        ({"gpus_per_trial": 0.25}, 1, True, resources(10, 2), TrialResources(8, 1.0, 0.25)),
        ({}, 3, False, resources(10), TrialResources(3, 0.0, 0.0)),
        ({}, 2, True, resources(30, 8), TrialResources(4, 0.0, 0.0)),
        ({}, {"min": 2, "max": 8}, False, resources(6), TrialResources(1, 0.0, 0.0)),
        # A trial of one worker runs on one node.
        (
            {"cpus_per_trial": 3},
            1,
            False,
            nodes((4, 0), (4, 0), (2, 0)),
            TrialResources(2, 3.0, 0.0),
        ),
        ({}, 1, True, nodes((16, 0), (4, 2), (1, 2)), TrialResources(3, 1.0, 1.0)),
        ({}, 3, False, nodes((2, 0), (2, 0)), TrialResources(1, 0.0, 0.0)),
    ],
)
def test_the_cluster_is_divided_among_trials(settings, workers, gpu, cluster, expected):
    training = training_of(workers)
    assert trial_resources(TuneConfig(**settings), training, gpu, cluster) == expected


def test_a_trial_never_requests_nothing():
    assert TrialResources(2, 0.5, 0.0).request == {"CPU": 0.5}
    assert TrialResources(2, 1.0, 0.25).request == {"CPU": 1.0, "GPU": 0.25}
    assert TrialResources(2, 0.0, 0.0).request == {"memory": 1}


@pytest.mark.parametrize(
    ("settings", "workers", "words"),
    [
        ({"cpus_per_trial": 3}, 1, "tune.cpus_per_trial=3: the cluster has 2 CPUs"),
        ({"gpus_per_trial": 1}, 1, "tune.cpus_per_trial=1 and tune.gpus_per_trial=1: the cluster"),
        ({}, 4, "finetune.workers=4: the cluster has 2 CPUs"),
        ({}, {"min": 4, "max": 9}, "finetune.workers=4: the cluster has 2 CPUs"),
    ],
)
def test_a_cluster_that_is_too_small_for_a_trial_is_rejected(settings, workers, words):
    training, cluster = training_of(workers), resources(4, started_here=True)
    with pytest.raises(ConfigError, match=words):
        trial_resources(TuneConfig(**settings), training, False, cluster)


def test_a_trial_that_fits_on_no_single_node_is_rejected():
    """Ray Tune would wait forever for such a node."""
    with pytest.raises(ConfigError, match=r"has 8 CPUs and 0 GPUs for trials, 4 and 0 on its larg"):
        trial_resources(TuneConfig(cpus_per_trial=6), training_of(1), False, nodes((4, 0), (4, 0)))
