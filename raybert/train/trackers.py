"""Trackers of experiments beside a run's own log: TensorBoard, MLflow, Weights & Biases.

They are `run.trackers` of the run's configuration, and get what rank 0 logs. One thread does all
that may take time or fail: import, connection, requests. A tracker that fails, or is so slow that
too many records wait for it, is left with one message; training never waits for it but at its end,
for a few seconds.
"""

from __future__ import annotations

import hashlib
import importlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from raybert.config import flatten
from raybert.errors import RaybertError, UserError, one_line
from raybert.storage.folder import Folder
from raybert.train.run_folder import CONFIG
from raybert.yaml_values import parse_yaml

IDS = "trackers.json"  # in the run's folder: the ids of its runs elsewhere, by tracker
MAX_WAITING = 1000  # records
END_SECONDS = 10.0  # that the end of a run waits for what is left
_NOT_METRICS = {"kind", "step", "time", "total_steps", "seconds"}
_NAMES = {"train": "train", "eval": "validation"}  # of records, as TensorBoard groups curves


class RunInfo(NamedTuple):
    """What a tracker is told of a run."""

    folder: Folder
    experiment: str  # its name
    stage: str  # the name of the run's folder, as pretrain
    settings: Mapping[str, Any]  # of its configuration, by dotted key
    step: int  # from which it trains: an earlier attempt's records from there on do not count


class Tracker(Protocol):
    """A tracker; each method may raise or take any time. `known` is what `id` returned before."""

    def open(self, run: RunInfo, known: str | None) -> str | None:
        """Begin a run, or continue the one with the id `known`; return its id."""

    def log(self, values: Mapping[str, float], step: int, seconds: float) -> None:
        """Log metrics of a step, at a time in seconds since 1970."""

    def finish(self, result: Mapping[str, float], model: str | None) -> None:
        """End the run with its result, and the local folder of its model, if there is one."""


class TensorBoard:
    """Writes events to `tensorboard/` in the run's folder."""

    def open(self, run: RunInfo, known: str | None) -> str | None:  # noqa: D102
        if not run.folder.is_local:
            raise UserError(f"events are appended to files, which {run.folder} does not support")
        writer = _import("tensorboardX", "report")
        path = str(run.folder / "tensorboard")
        self._writer = writer.SummaryWriter(logdir=path, purge_step=run.step or None)
        return None

    def log(self, values: Mapping[str, float], step: int, seconds: float) -> None:  # noqa: D102
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=seconds)
        self._writer.flush()

    def finish(self, result: Mapping[str, float], model: str | None) -> None:  # noqa: D102
        self._writer.close()


class MLflow:
    """Logs to the server, or folder, of MLFLOW_TRACKING_URI."""

    def open(self, run: RunInfo, known: str | None) -> str | None:  # noqa: D102
        mlflow = _import("mlflow", "mlflow")
        self._metric = mlflow.entities.Metric
        self._client = mlflow.MlflowClient()
        if known is None:
            found = self._client.get_experiment_by_name(run.experiment)
            where = found.experiment_id if found else self._client.create_experiment(run.experiment)
            known = str(self._client.create_run(where, run_name=run.stage).info.run_id)
            params = [mlflow.entities.Param(k, str(v)[:500]) for k, v in run.settings.items()]
            for begin in range(0, len(params), 100):  # in a request, at most
                self._client.log_batch(known, params=params[begin : begin + 100])
        self._id = known
        return known

    def log(self, values: Mapping[str, float], step: int, seconds: float) -> None:  # noqa: D102
        at = int(1000 * seconds)
        metrics = [self._metric(name, value, at, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self, result: Mapping[str, float], model: str | None) -> None:  # noqa: D102
        self.log({f"result/{name}": value for name, value in result.items()}, 0, time.time())
        if model is not None:
            self._client.log_artifacts(self._id, model, "model")
        self._client.set_terminated(self._id)


class WeightsAndBiases:
    """Logs to Weights & Biases, by the settings of its own environment, as WANDB_MODE."""

    def open(self, run: RunInfo, known: str | None) -> str | None:  # noqa: D102
        wandb = _import("wandb", "wandb")
        known = known or hashlib.sha256(f"{run.folder.uri} {time.time()}".encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=run.experiment,
            name=run.stage,
            id=known,
            resume="allow",
            config=dict(run.settings),
            dir=run.folder.path if run.folder.is_local else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
        return known

    def log(self, values: Mapping[str, float], step: int, seconds: float) -> None:  # noqa: D102
        self._run.log(dict(values), step=step)

    def finish(self, result: Mapping[str, float], model: str | None) -> None:  # noqa: D102
        self._run.summary.update({f"result/{name}": value for name, value in result.items()})
        self._run.finish()


TRACKERS: dict[str, Callable[[], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{one_line(error)}; pip install 'raybert[{extra}]'") from None


class _Follower:
    """One tracker in a thread of its own."""

    def __init__(self, name: str, run: RunInfo, known: str | None) -> None:
        self._name, self._run, self._known = name, run, known
        self._waiting: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(MAX_WAITING)
        self.problem: str | None = None  # why it gets no more records
        self._is_told = False
        self.id: str | None = None
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            tracker = TRACKERS[self._name]()
            self.id = tracker.open(self._run, self._known)
            if self.id is not None and self.id != self._known:
                _store_id(self._run.folder, self._name, self.id)
            while (call := self._waiting.get()) is not None:
                call(tracker)
        except BaseException as error:  # also what a library raises to end the process
            self.problem = self.problem or one_line(error)

    def put(self, call: Callable[[Tracker], None] | None) -> None:
        if self.problem is None:
            try:
                self._waiting.put_nowait(call)
            except queue.Full:
                self.problem = f"{MAX_WAITING:,} records wait for it"

    def wait(self, seconds: float) -> None:
        """Wait for what was put; not for a tracker that is left."""
        if self.problem is not None:
            return
        self.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.problem = self.problem or f"it has not ended within {END_SECONDS:g} s"

    def message(self) -> str | None:
        """The problem, once."""
        if self.problem is None or self._is_told:
            return None
        self._is_told = True
        return f"run.trackers: {self._name} gets no more records: {self.problem}"


_STORING = threading.Lock()


def _store_id(folder: Folder, name: str, value: str) -> None:
    with _STORING:  # several trackers begin at once
        folder.write_json(IDS, {**_known_ids(folder), name: value})


def _known_ids(folder: Folder) -> dict[str, str]:
    with suppress(RaybertError, OSError):
        if folder.exists(IDS):
            found = folder.read_json(IDS)
            return found if isinstance(found, dict) else {}
    return {}


class Trackers:
    """The trackers of a run, on rank 0."""

    def __init__(self, folder: Folder, step: int) -> None:
        """Begin those that the run's configuration names; nothing here raises."""
        self._followers: list[_Follower] = []
        values: Any = {}
        with suppress(RaybertError, OSError):
            if folder.exists(CONFIG):
                values = parse_yaml(folder.read_text(CONFIG), CONFIG)
        named = values.get("run", {}).get("trackers", []) if isinstance(values, dict) else []
        if not named:
            return
        stage = Path(folder.path).name
        settings = dict(flatten({key: values.get(key, {}) for key in (stage, "model")}))
        run = RunInfo(folder, str(values["run"].get("name")), stage, settings, step)
        known = _known_ids(folder)
        self._followers = [_Follower(n, run, known.get(n)) for n in named if n in TRACKERS]

    def log(self, record: Mapping[str, Any]) -> None:
        """Pass on the numbers of a record of training or of an evaluation."""
        prefix = _NAMES.get(record["kind"])
        if prefix is None or not self._followers:
            return
        values = {f"{prefix}/{name}": value for name, value in numbers(record).items()}
        step, seconds = record["step"], time.time()
        for follower in self._followers:
            follower.put(lambda tracker: tracker.log(values, step, seconds))

    def messages(self) -> list[str]:
        """A message for each tracker that has failed since the last call."""
        return [text for follower in self._followers if (text := follower.message())]

    def leave(self) -> None:
        """End an attempt that has not finished: the next one continues it."""
        for follower in self._followers:
            follower.put(None)

    def finish(self, result: Mapping[str, Any]) -> list[str]:
        """End a finished run; wait a few seconds for what is left. Returns messages."""
        model = str(result.get("model", ""))
        folder = model if Path(model).is_dir() else None
        for follower in self._followers:
            follower.put(lambda tracker: tracker.finish(numbers(result), folder))
        end = time.monotonic() + END_SECONDS
        for follower in self._followers:
            follower.wait(max(0.0, end - time.monotonic()))
        return self.messages()


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The metrics in a record or a result."""
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and name not in _NOT_METRICS
        and not isinstance(value, bool)
    }  # fmt: skip
