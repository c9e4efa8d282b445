"""What happens when a worker is lost: restarts, giving up, and what the user is told."""

import pyarrow
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import RayActorError, RayTaskError
from ray.train import (
    ControllerError,
    FailureConfig,
    PreemptionError,
    PreemptionInfo,
    WorkerGroupError,
)
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision

from raybert.errors import RaybertError, StorageError
from raybert.storage.folder import Folder
from raybert.train.ray.driver_channel import DriverChannel
from raybert.train.ray.failures import (
    find_causes,
    format_failure,
    is_permanent,
    to_user_error,
)
from raybert.train.ray.recovery import FailureContext, NoProgressFailurePolicy
from raybert.train.task import Preempted

LOST = WorkerGroupError("lost", {1: RuntimeError("Connection closed by peer"), 2: RayActorError()})
NO_PLACE = ControllerError(WorkerGroupStartupTimeoutError(3))
PREEMPTED = WorkerGroupError("left", {0: Preempted("a node is preempted at step 7")})
TAKEN = PreemptionError(PreemptionInfo(None, {"a": [1]}))


class Context:
    """A run whose checkpoints a test writes."""

    def __init__(self):
        self.step, self.messages = 0, []

    def last_step(self):
        return self.step

    def send_event(self, event, message):
        self.messages.append(message)


def restarts(policy, error):
    return policy.make_decision(error) == FailureDecision.RETRY


@given(limit=st.integers(0, 5), progress=st.lists(st.integers(0, 1), max_size=30))
def test_only_restarts_without_a_new_checkpoint_count(limit, progress):
    """A run gives up exactly where more than `max_failures` in a row had no new checkpoint."""
    context = Context()
    policy = NoProgressFailurePolicy(FailureConfig(max_failures=limit), context)
    in_a_row = 0
    for steps in progress:
        context.step += steps
        in_a_row = 1 if steps else in_a_row + 1
        assert restarts(policy, LOST) == (in_a_row <= limit)
        if in_a_row > limit:
            return


def test_a_run_without_progress_reports_the_number_of_restarts():
    context = Context()
    policy = NoProgressFailurePolicy(FailureConfig(max_failures=3), context)
    for _ in range(2):
        restarts(policy, LOST)
    context.step = 5
    restarts(policy, LOST)
    assert context.messages == [
        "a worker was lost: starting again from step 0",
        "a worker was lost: starting again from step 0 (restart 2 of at most 3 without a new "
        "checkpoint)",
        "a worker was lost: starting again from step 5",
    ]


@pytest.mark.parametrize("error", [NO_PLACE, PREEMPTED, TAKEN])
def test_preempted_and_missing_nodes_are_no_failures(error):
    policy = NoProgressFailurePolicy(FailureConfig(max_failures=0), Context())
    assert all(restarts(policy, error) for _ in range(20))
    assert not restarts(policy, LOST)


def test_a_failure_while_workers_start_counts():
    context = Context()
    policy = NoProgressFailurePolicy(FailureConfig(max_failures=1), context)
    assert restarts(policy, ControllerError(RayActorError()))
    assert context.messages == ["a worker was lost: starting again from step 0"]
    assert not restarts(policy, ControllerError(RayActorError()))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LOST, "a worker was lost"),
        (NO_PLACE, "not all workers found a place in time"),
        (PREEMPTED, "a node is preempted at step 7"),
        (TAKEN, "a node is taken away"),
        (WorkerGroupError("", {0: ValueError("first\nlast line")}), "last line"),
        (
            WorkerGroupError("", {3: RuntimeError("[gloo/pair.cc] reset")}),
            "a worker does not answer",
        ),
        (WorkerGroupError("", {0: WorkerHealthCheckTimeoutError("")}), "a worker does not answer"),
        (
            WorkerGroupError("", {0: WorkerHealthCheckFailedError("", RayActorError())}),
            "a worker was lost",
        ),
        (WorkerGroupError("", {3: RuntimeError("of its own")}), "of its own"),
        (WorkerGroupError("", {0: ValueError()}), "ValueError"),
    ],
)
def test_the_message_names_the_cause_and_not_its_consequences(error, message):
    assert format_failure(error) == message


def test_causes_are_in_the_order_of_ranks():
    first, second = ValueError("a"), ValueError("b")
    assert find_causes(WorkerGroupError("", {5: second, 0: first})) == [first, second]


def test_an_error_that_the_user_can_mend_keeps_its_class():
    full = StorageError("writing x failed: No space left on device")
    assert to_user_error(WorkerGroupError("", {0: full})) is full
    other = to_user_error(WorkerGroupError("", {0: ValueError("odd")}))
    assert type(other) is RaybertError and str(other) == "training failed: odd"


class TensorError(RuntimeError):
    """As `torch._dynamo` has its own."""


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x16 and 8x16)"), True),
        (RuntimeError("The size of tensor a (64) must match the size of tensor b (32)"), True),
        (TensorError("backend='inductor' raised: no compiler"), True),
        (ValueError("too many values to unpack"), True),
        (KeyError("label"), True),
        (NotImplementedError("not for bf16"), True),
        (RayTaskError("f", "Traceback ...", ValueError("bad row")), True),
        (RuntimeError("[gloo] Connection closed by peer [10.0.0.2]"), False),
        (RuntimeError("NCCL error: unhandled system error"), False),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), True),  # an id past a table
        (RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm`"), True),
        (RayTaskError("f", "Traceback ...", OSError("no route to host")), False),
        (RayActorError(), False),
        (torch.distributed.DistNetworkError("the store is gone"), False),
        (ConnectionResetError("by peer"), False),
        (TimeoutError("no answer"), False),
        (pyarrow.ArrowInvalid("a part that was cut while it was read"), False),
        (StorageError("no answer"), False),
    ],
)
def test_an_error_of_the_program_is_permanent_and_one_of_a_node_is_not(error, is_one):
    assert is_permanent(error) == is_one


def test_the_last_step_is_that_of_the_latest_checkpoint(tmp_path):
    run = Folder(tmp_path)
    context = FailureContext(run, DriverChannel())
    assert context.last_step() == 0
    (run / "checkpoints").write_json("step-00000012.json", {})
    assert context.last_step() == 12


def test_a_head_that_does_not_answer_is_no_failure_of_the_policy(tmp_path):
    FailureContext(Folder(tmp_path), DriverChannel()).send_event("restart", "no Ray runs here")
