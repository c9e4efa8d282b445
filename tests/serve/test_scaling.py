"""The number of replicas follows their work, of which a request may have any amount."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybert.serve.deploy.scaling import LOAD, TARGET_LOAD, count_replicas

LOADS = st.lists(st.floats(0, 2), max_size=8)


def wanted(loads, requests=0.0, target=32.0, metrics=True):
    figures = {LOAD: {f"r{i}": load for i, load in enumerate(loads)}} if metrics else None
    config = SimpleNamespace(target_ongoing_requests=target)
    context = SimpleNamespace(
        aggregated_metrics=figures, total_num_requests=requests, config=config
    )
    return count_replicas(context)[0]


@pytest.mark.parametrize(
    ("loads", "requests", "replicas"),
    [
        ([0.0], 0, 0),
        ([1.0], 2, 2),  # two lists of texts keep a replica busy
        ([2.0], 3, 3),  # and fill its queue
        ([0.7, 0.7], 10, 2),
        ([0.3, 0.3], 10, 1),
        ([0.1], 200, 7),  # many short requests
    ],
)
def test_work_and_requests_are_shared_by_as_many_replicas_as_they_need(loads, requests, replicas):
    assert math.ceil(wanted(loads, requests)) == replicas


@given(LOADS, st.integers(0, 500), st.floats(1, 100))
def test_each_replica_gets_its_share_at_most(loads, requests, target):
    replicas = wanted(loads, requests, target)
    assert sum(loads) <= TARGET_LOAD * replicas + 1e-9
    assert requests <= target * replicas + 1e-9


def test_before_the_first_figures_requests_count():
    assert wanted([], 64, metrics=False) == 2
