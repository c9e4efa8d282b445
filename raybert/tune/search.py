"""Ray Tune: which trial runs when, who is stopped, who takes over whose weights.

Ray Tune's own memory of a search (pickles, which lag behind the trials) is not used: a search that
was killed is a new one of Ray Tune's, over the trials that the ledger has. Schedulers are told what
earlier sessions saw.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol

import ray.tune
from ray.tune.experiment import Experiment, Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search.search_algorithm import SearchAlgorithm

from raybert.errors import ConfigError, RaybertError, Superseded
from raybert.ray_session import Resources
from raybert.storage import Folder
from raybert.train.board import Board
from raybert.tune.ledger import ENDED, Entry, Evaluation, Ledger
from raybert.tune.settings import SchedulerConfig, TuneConfig
from raybert.tune.space import Space
from raybert.tune.trial import FinetuneTrial, Work

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 60  # for the steps under way and their checkpoints, after Ctrl-C
_SETTLED_SECONDS = 60  # after which a trial that is over has written all that it will
_NO_CPU = 0.001  # of a trial whose workers are Ray Train's: Ray wants something to be asked for
#: Ray Data's logical CPUs on a Ray started here, which trials have no use for.
_SPARE_CPUS = 2


class Source(Protocol):
    """Where trials come from."""

    entries: list[Entry]

    def next(self) -> Entry | None:
        """The next trial to run; None: there are no more."""

    def end(self, entry: Entry) -> None:
        """Hear of a trial that has ended."""


class Watcher(Protocol):
    """What wants to know how trials go; called from Ray Tune's thread."""

    def evaluated(self, entry: Entry) -> None:
        """A trial has one more evaluation."""

    def ended(self, entry: Entry) -> None:
        """A trial is over."""


@dataclass(frozen=True)
class Room:
    """How many trials run at a time, and what each is given."""

    trials: int
    cpus: float
    gpus: float


def room_for(config: TuneConfig, workers: int, gpu: bool, resources: Resources) -> Room:
    """Divide the cluster among trials.

    Args:
        config: the search.
        workers: of a trial, at most.
        gpu: whether they train on GPUs.
        resources: what the cluster has.

    Raises:
        ConfigError: there is no room for a single trial.
    """
    cpus, gpus = config.cpus_per_trial, config.gpus_per_trial
    gpus = float(gpu) if gpus is None else gpus
    usable = resources.cpus - (_SPARE_CPUS if resources.started_here else 0)
    if workers > 1:  # Ray Train asks for their CPUs itself, and leaves one for Ray Data
        counts, asked = [(resources.cpus - 1) // workers], f"finetune.workers={workers}"
        if gpu:
            counts.append(resources.gpus // workers)
        cpus, gpus = _NO_CPU, 0.0
    else:
        counts, asked = [usable // cpus], f"tune.cpus_per_trial={cpus:g}"
        if gpus:
            counts.append(resources.gpus // gpus)
            asked += f" and tune.gpus_per_trial={gpus:g}"
    most = int(min(counts))
    if most < 1:
        raise ConfigError(
            f"{asked}: the cluster has {usable:g} CPUs and {resources.gpus:g} GPUs for trials; "
            "lower that"
        )
    return Room(min(most, config.concurrency or most), cpus, gpus)


@dataclass
class Session:
    """A search under way: what Ray Tune's parts, the display and the driver know together."""

    source: Source
    ledger: Ledger
    room: Room
    deadline: float | None = None  # of time.monotonic
    watchers: list[Watcher] = field(default_factory=list)
    keeps_checkpoints: bool = False  # of trials that are over: others may take them over
    running: dict[str, Trial] = field(default_factory=dict)
    is_stopping: bool = False
    superseded: str | None = None  # another driver is at the same search
    _is_exhausted: bool = False
    _swept: set[str] = field(default_factory=set)

    @property
    def out_of_time(self) -> bool:
        """Whether the search's minutes are over."""
        return self.deadline is not None and time.monotonic() > self.deadline

    @property
    def is_over(self) -> bool:
        """Whether no trial is to begin any more."""
        return self._is_exhausted or self.is_stopping or self.out_of_time

    @property
    def busy(self) -> int:
        """Trials that have a worker, or wait for one."""
        return sum(t.status in (Trial.PENDING, Trial.RUNNING) for t in self.running.values())

    @property
    def is_idle(self) -> bool:
        """Whether no trial runs, or would go on."""
        return all(trial.is_finished() for trial in self.running.values())

    def next(self) -> Entry | None:
        """The next trial, if there is room for one."""
        if self.is_over or self.busy >= self.room.trials:
            return None
        entry = self.source.next()
        self._is_exhausted = entry is None
        return entry

    def entry(self, trial: Trial) -> Entry:
        """What the ledger has of a trial."""
        return next(e for e in self.source.entries if e.name == trial.trial_id)

    def hear(self, trial: Trial, result: dict[str, Any]) -> None:
        """A trial was evaluated."""
        entry = self.entry(trial)
        if "accuracy" in result and not {"failed", "interrupted"} & result.keys():
            entry.evaluations.append(Evaluation.of({**result, "time": time.time()}))
            for watcher in self.watchers:
                watcher.evaluated(entry)

    def end(self, trial: Trial, error: str | None = None) -> None:
        """A trial is over: write down how."""
        entry, result = self.entry(trial), trial.last_result or {}
        self.running.pop(entry.name, None)
        if error is None and result.get("interrupted"):
            entry.state = "waiting"  # the next session goes on with it
            if "superseded" in result:
                self.superseded, self.is_stopping = str(result["superseded"]), True
            return
        self.ledger.refresh(entry)
        if error is not None or "failed" in result:
            self.ledger.close(entry, "failed", error or str(result["failed"]))
        elif result.get("ended"):
            self.ledger.close(entry, "finished")
        else:
            why = "the time was up" if self.out_of_time else f"stopped at epoch {entry.epoch:g}"
            self.ledger.close(entry, "stopped", why)
        self.source.end(entry)
        for watcher in self.watchers:
            watcher.ended(entry)
        if not self.keeps_checkpoints:
            self.sweep(_SETTLED_SECONDS)

    def sweep(self, seconds: float = 0.0) -> None:
        """Delete the checkpoints of trials that were over so long ago: nothing goes on from them.

        One that has just ended may still be written to.
        """
        for entry in self.source.entries:
            is_old = entry.ended is not None and time.time() - entry.ended >= seconds
            if is_old and entry.state in ENDED and entry.name not in self._swept:
                self._swept.add(entry.name)
                self.ledger.run(entry.name).delete("checkpoints")


class _Search(SearchAlgorithm):  # type: ignore[misc]  # of an untyped package
    """Gives Ray Tune the session's trials, one by one."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._spec: dict[str, Any] = {}

    def add_configurations(self, experiments: list[Experiment]) -> None:
        [experiment] = experiments
        self._spec = experiment.spec

    def next_trial(self) -> Trial | None:
        entry = self._session.next()
        if entry is None:
            return None
        spec = self._spec
        trial = Trial(
            spec["run"],
            config={"seed": entry.seed, **entry.values},
            trial_id=entry.name,
            evaluated_params=entry.values,
            experiment_tag=entry.name,
            storage=spec["storage"],
            placement_group_factory=spec["resources_per_trial"],
            checkpoint_config=spec["checkpoint_config"],
            max_failures=spec["max_failures"],
        )
        self._session.running[entry.name] = trial
        return trial

    def is_finished(self) -> bool:
        # While trials run, their workers are kept warm for those that take over others' weights.
        return self._session.is_over and self._session.is_idle


class _Listener(ray.tune.Callback):  # type: ignore[misc]
    """Hands on what Ray Tune tells of trials."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        self._session.entry(trial).state = "running"

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        self._session.hear(trial, result)

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **_: Any
    ) -> None:
        self._session.end(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        self._session.end(trial, _what_was_lost(trial))


def make_scheduler(
    config: SchedulerConfig, space: Space | None, most_epochs: float, session: Session
) -> TrialScheduler:
    """Build Ray Tune's scheduler, told of what earlier sessions saw.

    Raises:
        ConfigError: the first rung is past the end.
    """
    common: dict[str, Any] = {"time_attr": "epoch"}
    match config.kind:
        case "asha":
            if config.grace_epochs > most_epochs:
                raise ConfigError(
                    f"tune.scheduler.grace_epochs={config.grace_epochs:g} is past the longest "
                    f"trial's {most_epochs:g} epochs; lower it, or set tune.scheduler.kind=none"
                )
            scheduler = _bounded(AsyncHyperBandScheduler, session)(
                max_t=most_epochs,
                grace_period=config.grace_epochs,
                reduction_factor=config.reduction,
                stop_last_trials=False,
                **common,
            )
            for entry in session.source.entries:
                _replay(scheduler, entry)
        case "hyperband":
            scheduler = _bounded(HyperBandScheduler, session)(
                max_t=max(1, math.ceil(most_epochs)),
                reduction_factor=config.reduction,
                stop_last_trials=False,
                **common,
            )
        case "pbt":
            assert space is not None
            scheduler = _bounded(PopulationBasedTraining, session)(
                perturbation_interval=config.interval_epochs,
                hyperparam_mutations=_mutations(space),
                quantile_fraction=config.quantile,
                custom_explore_fn=space.clip,
                log_config=False,
                **common,
            )
        case _:
            scheduler = _bounded(FIFOScheduler, session)()
    return scheduler


def _bounded(kind: type[TrialScheduler], session: Session) -> type[TrialScheduler]:
    """A scheduler that wakes no more trials than there is room for, and none past the time."""

    class Bounded(kind):  # type: ignore[misc, valid-type]
        def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
            trial = super().choose_trial_to_run(tune_controller)
            wakes = trial is not None and trial.status == Trial.PAUSED
            return None if wakes and session.busy >= session.room.trials else trial

        def on_trial_result(
            self, tune_controller: Any, trial: Trial, result: dict[str, Any]
        ) -> str:
            if session.out_of_time:
                return str(TrialScheduler.STOP)
            return str(super().on_trial_result(tune_controller, trial, result))

    return Bounded


def _replay(scheduler: AsyncHyperBandScheduler, entry: Entry) -> None:
    """Tell a scheduler of an earlier session's evaluations, as if the trial were of this one."""
    [bracket] = scheduler._brackets
    best = -math.inf
    for evaluation in entry.evaluations:
        best = max(best, evaluation.score)
        bracket.on_result(SimpleNamespace(trial_id=entry.name), evaluation.epoch, best)


def _mutations(space: Space) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for dimension in space.dimensions:
        low, high = dimension.low, dimension.high
        if dimension.kind == "choice":
            found[dimension.key] = list(dimension.choices)
        elif dimension.is_integer:
            draw = ray.tune.lograndint if dimension.is_log else ray.tune.randint
            found[dimension.key] = draw(int(low), int(high) + 1)
        else:
            draw = ray.tune.loguniform if dimension.is_log else ray.tune.uniform
            found[dimension.key] = draw(low, high)
    return found


def _what_was_lost(trial: Trial) -> str:
    """Why Ray Tune gave a trial up: its worker did not come back as often as it was started."""
    text = ""
    with suppress(OSError, TypeError):
        with open(trial.error_file, encoding="utf-8", errors="replace") as file:
            text = file.read()
    reason = "its worker ran out of memory" if "memory" in text.lower() else "its worker was lost"
    return f"{reason}, {trial.num_failures} times"


def run_trials(
    work: Work,
    session: Session,
    scheduler: TrialScheduler,
    *,
    max_failures: int,
    stage: Folder,
    logs: bool,
    show: Callable[[], None],
) -> None:
    """Run a session's trials to their ends.

    Args:
        work: what the trials share.
        session: the trials, and how they go.
        scheduler: who is stopped.
        max_failures: restarts of a trial whose worker is lost.
        stage: a folder, inside of which Ray Tune has one to write in.
        logs: whether Ray Tune shall say what it does.
        show: called twice a second, to show how far it is.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; running trials have saved their state.
        Superseded: another driver has taken up the same trials.
        RaybertError: Ray Tune itself failed.
    """
    scratch, name = stage / "ray", f"attempt-{time.time_ns()}"
    request = {"CPU": session.room.cpus, "GPU": session.room.gpus}
    arguments: dict[str, Any] = {
        "name": name,
        "metric": "score" if isinstance(scheduler, PopulationBasedTraining) else "best",
        "mode": "max",
        "resources_per_trial": ray.tune.PlacementGroupFactory([request]),
        "storage_path": scratch.path,
        "storage_filesystem": scratch.filesystem,
        "search_alg": _Search(session),
        "scheduler": scheduler,
        "checkpoint_config": ray.tune.CheckpointConfig(checkpoint_at_end=False),
        "callbacks": [_Listener(session)],
        "max_failures": max_failures,
        "reuse_actors": True,
        "raise_on_failed_trial": False,
        "verbose": 0,
    }
    trainable = ray.tune.with_parameters(FinetuneTrial, work=work)
    with _quiet(session.room.trials, logs):
        _Fit(lambda: ray.tune.run(trainable, **arguments), session, work.board, show).wait()
    if session.superseded is not None:
        raise Superseded(session.superseded)
    session.sweep()
    scratch.delete(name)
    if not scratch.names(hidden=True):  # another driver's attempt may be at work there
        stage.delete("ray")


class _Fit:
    """Runs Ray Tune in a thread, while the main thread shows progress and listens to Ctrl-C.

    In the main thread Ray Tune would answer Ctrl-C itself, and give trials five seconds to end.
    """

    def __init__(
        self, fit: Callable[[], Any], session: Session, board: Board, show: Callable[[], None]
    ) -> None:
        self._fit, self._session, self._board, self._show = fit, session, board, show
        self._error: Exception | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tune", daemon=True)

    def wait(self) -> None:
        """Wait for the end."""
        self._thread.start()
        try:
            while not self._over.wait(_POLL_SECONDS):
                self._listen()
                self._show()
        except KeyboardInterrupt:
            self._session.is_stopping = True
            with suppress(Exception):  # a head that is gone takes the workers with it
                self._board.stop()
            self._over.wait(_GRACE_SECONDS)  # a second Ctrl-C ends this, too
            raise
        finally:
            if self._over.is_set():
                with suppress(Exception):
                    self._board.clear()
        if self._error is not None:
            if isinstance(self._error, RaybertError):
                raise self._error
            lines = str(self._error).strip().splitlines() or [type(self._error).__name__]
            raise RaybertError(f"the search failed: {lines[-1]}") from self._error

    def _listen(self) -> None:
        """Take what trials tell between evaluations."""
        with suppress(Exception):  # it is for the display alone
            known = {entry.name: entry for entry in self._session.source.entries}
            for record in self._board.take():
                entry = known.get(record.get("trial", ""))
                if entry is not None:
                    entry.step, entry.total_steps = record["step"], record.get("total_steps")

    def _run(self) -> None:
        try:
            self._fit()
        except Exception as error:  # raised by `wait`, in the main thread
            self._error = error
        finally:
            self._over.set()


@contextmanager
def _quiet(trials: int, logs: bool) -> Iterator[None]:
    """Keep Ray Tune from printing, from files that nobody reads, and from starting one by one."""
    wanted = {
        "RAY_AIR_NEW_OUTPUT": "0",  # its other way of printing can't be silenced
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_PRINT_ALL_TRIAL_ERRORS": str(int(logs)),
        "TUNE_MAX_PENDING_TRIALS_PG": str(trials),
        "TUNE_GLOBAL_CHECKPOINT_S": "600",  # the ledger is what a search goes on from
    }
    before = {name: os.environ.get(name) for name in wanted}
    logger = logging.getLogger("ray.tune")
    level = logger.level
    os.environ.update(wanted)
    if not logs:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
