"""How many workers an elastic run has: only nodes that stay count, and a resize is saved first."""

import socket
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from raybert.data.order import assign_to_ranks
from raybert.train.distributed import _interface_of
from raybert.train.ray import recovery
from raybert.train.ray.recovery import ElasticPolicy, accepts_connections


class Context:
    """A run whose checkpoints a test writes."""

    def __init__(self):
        self.step, self.events = 0, []
        self.channel = SimpleNamespace(request_save=lambda: self.events.append("save"))

    def last_step(self):
        return self.step

    def send_event(self, event, message):
        self.events.append(message)


class Clock:
    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(recovery, "time", clock)
    return clock


@pytest.fixture
def policy(clock, monkeypatch):
    return make_policy(monkeypatch, (2, 8))


def make_policy(monkeypatch, workers, micro_batches=None):
    """An elastic policy; `nodes` are CPUs by node id, `usable` those that stay.

    Ray's own code decides, and calls the methods that we override.
    """
    config = ScalingConfig(
        num_workers=workers, resources_per_worker={"CPU": 1}, elastic_resize_monitor_interval_s=0
    )
    policy = ElasticPolicy(config, Context(), micro_batches)
    policy.nodes, policy.usable, policy.requests = {"a": 4.0}, None, 0

    def count_request():
        policy.requests += 1

    monkeypatch.setattr(policy, "_maybe_send_resource_request", count_request)
    monkeypatch.setattr(
        policy,
        "_get_reserved_resources",
        lambda: {node: {"CPU": cpus} for node, cpus in policy.nodes.items()},
    )
    monkeypatch.setattr(
        policy, "usable_cpus", lambda: policy.nodes if policy.usable is None else policy.usable
    )
    return policy


def running(workers):
    return {
        "worker_group_state": SimpleNamespace(start_time=0, num_workers=workers),
        "worker_group_status": None,
    }


def test_one_cpu_is_left_for_ray_data(policy):
    assert policy.make_decision_for_non_running_worker_group().num_workers == 3


def test_nodes_that_are_gone_do_not_count(policy):
    policy.nodes = {"a": 4.0, "gone": 4.0}
    policy.usable = {"a": 4.0}
    assert policy.make_decision_for_non_running_worker_group().num_workers == 3


def test_waiting_for_nodes_is_reported_twice_a_minute(policy, clock):
    policy.nodes = {"a": 2.0}
    for seconds in (0, 10, 10, 20):
        clock.now += seconds
        assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)
    assert policy._context.events == ["waiting for nodes with room for 2 workers"] * 2


def decide(policy, clock, workers, seconds=30):
    """The decision about running workers, some seconds after the one before."""
    clock.now += seconds
    return policy.make_decision_for_running_worker_group(**running(workers))


def grown(policy, clock):
    """Nodes have joined 3 workers, there is room for 7, and the cluster is still again."""
    policy.nodes, policy._context.step = {"a": 4.0, "new": 4.0}, 10
    for _ in range(2):
        assert isinstance(decide(policy, clock, 3), NoopDecision)


def test_a_resize_waits_for_the_checkpoint_that_it_requested(policy, clock):
    grown(policy, clock)
    for _ in range(2):
        assert isinstance(decide(policy, clock, 3, seconds=1), NoopDecision)
    assert policy._context.events == ["save"]
    assert policy.requests == 4  # the autoscaler's request is kept alive meanwhile
    policy._context.step = 12
    decision = decide(policy, clock, 3)
    assert isinstance(decision, ResizeDecision) and decision.num_workers == 7
    assert policy._context.events[1:] == ["continuing with 7 workers"]


def test_a_resize_waits_as_long_as_a_checkpoint_takes_and_asks_for_it_again(policy, clock):
    """Without one, the steps since the last one would be taken again."""
    grown(policy, clock)
    for _ in range(10):
        assert isinstance(decide(policy, clock, 3, seconds=61), NoopDecision)
    assert policy._context.events == ["save"] * 11
    policy._context.step = 12
    assert decide(policy, clock, 3).num_workers == 7


def test_workers_that_were_lost_cancel_a_resize(policy, clock):
    grown(policy, clock)
    policy.make_decision_for_non_running_worker_group()
    policy._context.step = 12
    assert isinstance(decide(policy, clock, 7), NoopDecision)


def test_a_cluster_that_changes_all_the_time_causes_no_resize(policy, clock):
    for cpus in (5.0, 6.0, 5.0, 7.0, 6.0, 8.0):
        policy.nodes = {"a": cpus}
        assert isinstance(decide(policy, clock, 3), NoopDecision)
    assert policy._context.events == []
    assert isinstance(decide(policy, clock, 3), NoopDecision)
    assert policy._context.events == ["save"]  # it is still now


@given(st.integers(1, 64), st.data())
def test_workers_restart_only_where_the_slowest_gets_fewer_micro_batches(micro_batches, data):
    """8 micro-batches are 2 for the slowest of 4, 5, 6 and 7 workers, and 1 of 8."""
    most = max(3, micro_batches)
    draw = st.integers(2, most)
    now, then = data.draw(draw), data.draw(draw)
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(recovery, "time", clock)
        policy = make_policy(patch, (2, most), micro_batches)
        policy.nodes = {"a": then + 1.0}
        for _ in range(2):
            decide(policy, clock, now)
        slowest = [
            max(map(len, assign_to_ranks(micro_batches, workers))) for workers in (now, then)
        ]
        assert (policy._context.events == ["save"]) == (slowest[1] < slowest[0])


def test_a_node_that_accepts_no_connection_is_gone():
    with socket.create_server(("127.0.0.1", 0)) as raylet:
        host, port = raylet.getsockname()
        node = {"NodeManagerAddress": host, "NodeManagerPort": port}
        assert accepts_connections(node)
    assert not accepts_connections(node)


def test_the_interface_of_an_address_is_found():
    names = {name for _, name in socket.if_nameindex()}
    assert _interface_of("127.0.0.1") in names
    assert _interface_of("203.0.113.7") is None
