"""Private parts of Ray: they are used in one place, they are there, and Ray still calls ours."""

import ast
import asyncio
import functools
import importlib
import inspect
import logging
import os
import pkgutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

import raybert
from raybert.cluster.internals import core, data, serve, train
from raybert.cluster.internals import tune as ray_tune
from raybert.cluster.internals.private_names import (
    FALLBACKS,
    PRIVATE_NAMES,
    TESTED,
    find_missing,
    has_private_api,
    is_present,
)
from raybert.cluster.session import Resources
from raybert.errors import RaybertError

PACKAGE = Path(raybert.__file__).parent
INTERNALS = PACKAGE / "cluster" / "internals"
FILES = sorted(set(PACKAGE.rglob("*.py")) - set(INTERNALS.glob("*.py")))
ALL_NAMES = [name for group in PRIVATE_NAMES.values() for name in group]

#: Variables in Ray's public documentation.
DOCUMENTED = {
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
}


# Used in one place -------------------------------------------------------------------------------


def is_private(module):
    parts = module.split(".")
    return parts[0] == "ray" and (
        any(part.startswith("_") for part in parts)
        or parts[1:2] == ["experimental"]
        or parts[1:3] == ["train", "v2"]
    )


def docstrings(tree):
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            yield node.body[0].value


def private_names(code):
    """Yield Ray's private names in a module: imports, attributes, strings that name them."""
    tree = ast.parse(code)
    texts, described = set(), set(docstrings(tree))
    uses_ray = False
    own = {"_replace", "_asdict", "_fields"}  # of named tuples
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                modules = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), names=names):
                modules = [module, *(f"{module}.{alias.name}" for alias in names)]
            case _:
                modules = []
        uses_ray |= any(m.split(".")[0] == "ray" or ".internals" in m for m in modules)
        yield from filter(is_private, modules)
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                own.add(node.name)
            case ast.Name(id=name):
                own.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store()):
                own.add(name)
            case ast.Constant(value=str(text)) if node not in described:
                texts.add(text)
    for text in texts:
        is_variable = text.startswith("RAY_") and text.isidentifier() and text not in DOCUMENTED
        if is_variable or "ray._private" in text or "ray.rpc" in text or "_internal_kv" in text:
            yield text
    if uses_ray:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                is_special = node.attr.startswith("__") and node.attr.endswith("__")
                if not is_special and node.attr not in own:
                    yield node.attr


def test_private_names_of_ray_are_used_in_internals_only():
    found = {
        f"{file.relative_to(PACKAGE)}: {name}"
        for file in FILES
        for name in private_names(file.read_text(encoding="utf-8"))
    }
    assert sorted(found) == []


@pytest.mark.parametrize(
    "code",
    [
        "import ray._private.state",
        "from ray.serve.context import _get_global_client",
        "from ray.train.v2.api import exceptions",
        "from ray.experimental import internal_kv",
        "def f():\n    import ray\n    ray._raylet.Config.initialize('')",
        "import ray\nbracket._live_trials",
        "name = 'RAY_SERVE_SOMETHING'",
        "logger = 'ray._private.runtime_env'",
    ],
)
def test_a_private_name_is_found(code):
    assert list(private_names(code))


def test_no_class_overrides_a_private_method_of_ray_outside_internals():
    found = []
    for info in pkgutil.walk_packages([str(PACKAGE)], "raybert."):
        if info.name.startswith("raybert.cluster.internals") or info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        for name, kind in inspect.getmembers(module, inspect.isclass):
            if kind.__module__ != info.name:
                continue
            rays = [base for base in kind.__mro__ if base.__module__.startswith("ray.")]
            private = {
                attribute
                for base in rays
                for attribute in vars(base)
                if attribute.startswith("_") and not attribute.startswith("__")
            }
            found += [
                f"{info.name}.{name}.{n}" for n in private & vars(kind).keys() if n != "_abc_impl"
            ]
    assert found == []


# They are there ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_NAMES, ids=lambda name: name.partition("(")[0])
def test_this_ray_has_every_private_name(name):
    assert is_present(name)


def test_the_tested_ray_is_the_pinned_one():
    import ray

    text = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"ray[data,train,tune,serve]=={TESTED}.*"' in text
    assert ray.__version__.startswith(f"{TESTED}.")


def test_renamed_names_and_changed_parameters_are_missing():
    present = next(name for name in ALL_NAMES if "(" in name)
    changed = [
        "ray._no_such_module:name",
        present.replace("(", "_renamed("),
        present.replace(")", ", more)"),
        "ray.tune.schedulers.hyperband:_Bracket._no_such_attribute",
    ]
    assert find_missing([present, *changed]) == changed


@pytest.fixture
def without(monkeypatch):
    """Remove a private name of a group from this Ray."""

    def remove(group):
        broken = (*PRIVATE_NAMES[group], "ray._private:removed")
        monkeypatch.setitem(PRIVATE_NAMES, group, broken)
        has_private_api.cache_clear()

    has_private_api.cache_clear()
    yield remove
    has_private_api.cache_clear()


@pytest.mark.parametrize("group", FALLBACKS)
def test_a_missing_private_name_is_warned_of_once(without, group, caplog):
    without(group)
    assert not has_private_api(group)
    assert not has_private_api(group)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith(f"{FALLBACKS[group]}; install ray==2.60.*")
    assert "ray._private:removed" in record.getMessage()


@pytest.mark.parametrize("group", sorted(PRIVATE_NAMES.keys() - FALLBACKS.keys()))
def test_a_missing_private_name_without_a_substitute_is_an_error(without, group):
    without(group)
    with pytest.raises(RaybertError, match="lacks ray._private:removed; install ray==2.60"):
        has_private_api(group)


def test_without_its_private_names_training_uses_rays_own_policies(without, tmp_path):
    from ray.train.torch import TorchTrainer

    assert type(make_trainer(tmp_path)) is not TorchTrainer
    without("train")
    assert type(make_trainer(tmp_path)) is TorchTrainer
    assert not train.is_preempted()


def test_without_its_private_names_hyperband_is_rays_own(without):
    from raybert.cluster.internals.tune import BracketHyperBand
    from raybert.tune.schedulers.hyperband import HyperBand
    from raybert.tune.schedulers.scheduler import SchedulerConfig

    session = SimpleNamespace(source=SimpleNamespace(trials=[]))
    scheduler = HyperBand(SchedulerConfig(kind="hyperband"))
    assert isinstance(scheduler.build(None, 9, session), BracketHyperBand)
    without("hyperband")
    assert not isinstance(scheduler.build(None, 9, session), BracketHyperBand)


def test_without_its_private_names_ray_data_is_not_throttled(without):
    context = SimpleNamespace(custom_execution_callback_classes=[])
    without("data")
    data.throttle(context)
    assert context.custom_execution_callback_classes == []


def variables():
    """The variables that internals sets, by module."""
    names = set(core.ENVIRONMENT) | set(train.PROCESS_GROUP_SHUTDOWN)
    names |= set(train.controller_environment(60.0, is_elastic=True))
    for module in (core, train, serve, ray_tune):
        values = (value for name, value in vars(module).items() if name.isupper())
        names |= {v for v in values if isinstance(v, str) and v.startswith("RAY_")}
    return sorted(names)


@functools.cache
def source_of_ray():
    """Ray's modules that read variables, as one text."""
    import ray

    root = Path(ray.__file__).parent
    folders = ("_common", "_private", "serve/_private", "train", "tune", "dashboard/modules/job")
    files = [file for folder in folders for file in (root / folder).rglob("*.py")]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


@pytest.mark.parametrize("name", variables())
def test_ray_reads_every_variable(name):
    assert f'"{name}' in source_of_ray()


@pytest.mark.parametrize("ingress", ["auto", "proxy"])
def test_ray_serve_reads_every_variable(tmp_path, ingress):
    from raybert.serve.deploy.haproxy import serve_environment
    from raybert.serve.settings import ServeConfig

    names = serve_environment(ServeConfig(ingress=ingress), tmp_path)
    assert [name for name in names if f'"{name}"' not in source_of_ray()] == []


# Ray calls ours ----------------------------------------------------------------------------------


def make_trainer(folder, started_here=True, workers=2):
    from raybert.config import build
    from raybert.storage.folder import Folder
    from raybert.tasks.settings import PretrainConfig
    from raybert.train.ray.driver import _make_trainer
    from raybert.train.ray.driver_channel import DriverChannel
    from raybert.train.ray.worker import WorkerInputs

    run = Folder(folder)
    config = build(PretrainConfig, {"workers": workers}, "pretrain")
    job = SimpleNamespace(config=config, order_micro_batch_size=None)
    inputs = WorkerInputs(job, run, gpu=False, data_memory=1 << 20, channel=DriverChannel())
    return _make_trainer(inputs, Resources(4, 0, 1 << 30, started_here), run / "ray", "name")


@pytest.mark.parametrize("workers", [2, {"min": 1, "max": 3}])
def test_the_controller_gets_our_policies(tmp_path, monkeypatch, workers):
    from ray.train.torch import TorchTrainer

    from raybert.train.ray.recovery import ElasticPolicy, NoProgressFailurePolicy

    given = {}

    def run(self, **arguments):
        given.update(arguments)
        return SimpleNamespace(error=None)

    monkeypatch.setattr(TorchTrainer, "_initialize_and_run_controller", run)
    make_trainer(tmp_path, workers=workers).fit()
    assert type(given["failure_policy"]) is NoProgressFailurePolicy
    assert (type(given["scaling_policy"]) is ElasticPolicy) == (workers != 2)


@pytest.mark.parametrize("started_here", [True, False])
def test_helper_actors_without_a_use_are_left_out(tmp_path, started_here):
    from ray.train.torch import TorchTrainer

    def names(trainer):
        return {type(callback).__name__ for callback in trainer._create_default_callbacks()}

    usual = names(TorchTrainer(lambda: None))
    left = names(make_trainer(tmp_path, started_here=started_here))
    cleaner = {"PlacementGroupCleanerCallback"} if started_here else set()
    assert usual - left == {"DatasetsCallback"} | cleaner
    assert not left - usual


class Called(Exception):
    """Raised by a policy that Ray has called."""


@pytest.fixture
def controller(tmp_path):
    """Ray Train's controller, in this process, with policies that raise when they are called."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2._internal.execution.context import TrainRunContext
    from ray.train.v2._internal.execution.controller import TrainController

    from raybert.cluster.internals.train_controller import FailurePolicy, NodeScalingPolicy

    class Failure(FailurePolicy):
        def make_decision(self, training_failed_error):
            raise Called(training_failed_error)

    class Scaling(NodeScalingPolicy):
        def usable_cpus(self):
            raise Called("usable_cpus")

        def on_count(self, workers):
            pass

        def keep_requesting(self):
            pass

        _maybe_send_resource_request = keep_requesting

        def _get_reserved_resources(self):
            return {"node": {"CPU": 4.0}}

        def make_decision_for_running_worker_group(self, worker_group_state, worker_group_status):
            raise Called("running")

    scaling, run = (
        ScalingConfig(num_workers=(1, 3)),
        RunConfig(name="x", storage_path=str(tmp_path)),
    )
    context = TrainRunContext(
        run_config=run,
        train_loop_config={},
        scaling_config=scaling,
        backend_config=None,
        dataset_config=None,
    )
    return TrainController(None, context, Scaling(scaling), Failure(FailureConfig()))


def next_step(controller):
    return asyncio.run(controller._step())


def test_the_controller_asks_which_nodes_are_usable_before_a_start(controller):
    with pytest.raises(Called, match="usable_cpus"):
        next_step(controller)


@pytest.mark.parametrize("errors", [{}, {0: ValueError()}])
def test_the_controller_asks_both_policies_while_workers_run(controller, monkeypatch, errors):
    from ray.train import WorkerGroupError
    from ray.train.v2._internal.execution.controller.state import RunningState

    failure = WorkerGroupError("a worker failed", errors)
    status = SimpleNamespace(
        errors=errors,
        finished=False,
        worker_statuses={},
        get_preemption_info=lambda: None,
        get_worker_group_error=lambda: failure,
    )

    async def poll():
        return status

    monkeypatch.setattr(controller, "_poll_workers", poll)
    monkeypatch.setattr(controller, "get_state", RunningState)
    group = SimpleNamespace(get_worker_group_state=lambda: None)
    monkeypatch.setattr(controller, "get_worker_group", lambda: group)
    with pytest.raises(Called, match="a worker failed" if errors else "running"):
        next_step(controller)


def test_the_network_interface_is_selected_before_the_process_group_is_set_up():
    from ray.train.v2._internal.callbacks import BackendSetupCallback

    from raybert.train.ray.torch_backend import NodeInterfaceConfig, _select_interface

    class Workers:
        def execute(self, function, *arguments):
            raise Called(function.__name__)

    callback = BackendSetupCallback(NodeInterfaceConfig(backend="gloo"))
    with pytest.raises(Called, match=f"^{_select_interface.__name__}$"):
        callback.after_execution_group_start(Workers())


def test_a_worker_sees_that_its_node_is_preempted(monkeypatch):
    from ray.train import PreemptionInfo
    from ray.train.v2._internal.execution import context
    from ray.train.v2._internal.execution.preemption import PreemptionContext
    from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker

    here = SimpleNamespace(preemption_context=PreemptionContext(), get_world_rank=lambda: 0)
    monkeypatch.setattr(context, "_train_context", here)
    assert not train.is_preempted()
    RayTrainWorker.mark_preempt(SimpleNamespace(), PreemptionInfo(None, {"node": [0]}))
    assert train.is_preempted()


def test_node_events_are_not_printed(monkeypatch, capsys):
    from ray._private import worker

    stopped = threading.Event()

    class Events:
        def subscribe(self):
            pass

        def poll(self):
            stopped.set()
            return None, {"job_id": None, "error_message": "a worker died"}

    job = SimpleNamespace(binary=lambda: b"")
    ray_worker = SimpleNamespace(gcs_error_subscriber=Events(), current_job_id=job)
    calls = []

    def note(data, ignore_prefix):
        calls.append(data)

    monkeypatch.setattr(worker, "print_to_stdstream", note)
    worker.listen_error_messages(ray_worker, stopped)
    assert len(calls) == 1  # this is where Ray prints them
    stopped.clear()
    core.silence_node_events()
    worker.listen_error_messages(ray_worker, stopped)
    assert len(calls) == 1
    assert capsys.readouterr().out == ""


_RELOADED = """
import os
import ray._raylet
from raybert.cluster.internals.core import reload_environment
os.environ["RAY_AUTH_MODE"] = "token"
print(ray._raylet.get_authentication_mode())
reload_environment()
print(ray._raylet.get_authentication_mode())
"""


def test_ray_reads_its_environment_again():
    environment = {n: v for n, v in os.environ.items() if not n.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", _RELOADED],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment | {"RAY_AUTH_MODE": "disabled"},
        check=True,
    )
    before, after = done.stdout.split()
    assert before != after


@pytest.mark.ray
@pytest.mark.slow
def test_the_control_loop_of_ray_data_sleeps_between_steps(ray_session, monkeypatch):
    import ray.data

    slept = []
    monkeypatch.setattr(data, "time", SimpleNamespace(sleep=slept.append))
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    data.throttle(context)
    with ray.data.DataContext.current(context):
        assert ray.data.range(3).map_batches(lambda batch: batch).count() == 3
    assert slept and set(slept) == {0.05}


@pytest.mark.ray
def test_nobody_reads_the_logs_of_a_ray_that_was_started_here(ray_session):
    monitors = ray_session._private.worker._global_node.all_processes.get("log_monitor", [])
    assert all(info.process.poll() is not None for info in monitors)


@pytest.mark.ray
def test_no_node_of_an_idle_ray_is_draining(ray_session):
    assert core.draining_nodes() == set()
