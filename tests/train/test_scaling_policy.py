"""How many workers an elastic run has: only nodes that stay count, and a resize is saved first."""

import socket
from types import SimpleNamespace

import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

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
    """An elastic policy of 2 to 8 workers; `nodes` are CPUs by node id, `usable` those that stay.

    Ray's own code decides, and calls the methods that we override.
    """
    config = ScalingConfig(
        num_workers=(2, 8), resources_per_worker={"CPU": 1}, elastic_resize_monitor_interval_s=0
    )
    policy = ElasticPolicy(config, Context())
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


def test_a_resize_waits_for_the_checkpoint_that_it_requested(policy, clock):
    policy.nodes, policy._context.step = {"a": 4.0, "new": 4.0}, 10
    for _ in range(3):
        assert isinstance(policy.make_decision_for_running_worker_group(**running(3)), NoopDecision)
        clock.now += 1
    assert policy._context.events == ["save"]
    assert policy.requests == 3  # the autoscaler's request is kept alive meanwhile
    policy._context.step = 12
    decision = policy.make_decision_for_running_worker_group(**running(3))
    assert isinstance(decision, ResizeDecision) and decision.num_workers == 7
    assert policy._context.events[1:] == ["continuing with 7 workers"]


def test_a_resize_does_not_wait_for_a_checkpoint_that_does_not_come(policy, clock):
    policy.nodes = {"a": 4.0, "new": 4.0}
    policy.make_decision_for_running_worker_group(**running(3))
    clock.now += 61
    assert policy.make_decision_for_running_worker_group(**running(3)).num_workers == 7


def test_workers_that_were_lost_cancel_a_resize(policy):
    policy.nodes = {"a": 4.0, "new": 4.0}
    policy.make_decision_for_running_worker_group(**running(3))
    policy.make_decision_for_non_running_worker_group()
    policy._context.step = 12
    assert isinstance(policy.make_decision_for_running_worker_group(**running(7)), NoopDecision)


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
