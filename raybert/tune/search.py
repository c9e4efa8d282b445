"""Ray Tune: it starts workers, keeps them warm between trials, and asks the scheduler who goes on.

Its own memory of a search (pickles, which lag behind the trials) is not used: a search that was
killed is a new one of Ray Tune's, over the trials that the ledger has.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray.tune
from ray.tune.experiment import Experiment, Trial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler
from ray.tune.search.search_algorithm import SearchAlgorithm

from raybert.cluster.internals.tune import NEW_OUTPUT
from raybert.cluster.session import environment
from raybert.errors import RaybertError, Superseded
from raybert.storage.folder import Folder
from raybert.train.ray.driver_channel import DriverChannel
from raybert.train.ray.fit_thread import run_fit
from raybert.tune.search_session import Session
from raybert.tune.trial import FinetuneTrial, TrialContext
from raybert.tune.trial_store import TrialRecord


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
        if self._session.is_full:
            trial.set_status(Trial.PAUSED)
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


def _what_was_lost(trial: Trial) -> str:
    """Why Ray Tune gave a trial up: its worker did not come back as often as it was started."""
    text = ""
    with suppress(OSError, TypeError):
        with open(trial.error_file, encoding="utf-8", errors="replace") as file:
            text = file.read()
    low = "OutOfMemory" in text or "low on memory" in text  # by Ray; the kernel says nothing
    reason = "its node ran out of memory" if low else "its worker was lost"
    return reason if trial.num_failures == 1 else f"{reason}, {trial.num_failures} times"


def run_trials(
    work: TrialContext,
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
    arguments: dict[str, Any] = {
        "name": name,
        "metric": "score" if isinstance(scheduler, PopulationBasedTraining) else "best",
        "mode": "max",
        "resources_per_trial": ray.tune.PlacementGroupFactory([session.room.request]),
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

    def poll() -> None:
        _read_progress(work.board, session.source.entries)
        show()

    def interrupt() -> None:
        session.is_stopping = True

    trainable = ray.tune.with_parameters(FinetuneTrial, work=work)
    with _quiet(session.room.trials, logs):
        error = run_fit(
            lambda: ray.tune.run(trainable, **arguments), work.board, poll, on_interrupt=interrupt
        )
    if isinstance(error, RaybertError):
        raise error
    if error is not None:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RaybertError(f"the search failed: {lines[-1]}") from error
    if session.superseded is not None:
        raise Superseded(session.superseded)
    session.sweep()
    scratch.delete(name)
    if not scratch.names(hidden=True):  # another driver's attempt may be at work there
        stage.delete("ray")


def _read_progress(channel: DriverChannel, entries: Sequence[TrialRecord]) -> None:
    """Update the trials' steps from the records that their workers sent."""
    with suppress(Exception):  # only the display needs them
        known = {entry.name: entry for entry in entries}
        for record in channel.receive():
            entry = known.get(record.get("trial", ""))
            if entry is not None:
                entry.step, entry.total_steps = record["step"], record.get("total_steps")


@contextmanager
def _quiet(trials: int, logs: bool) -> Iterator[None]:
    """Set up Ray Tune's environment: no printing, no log files, trials started together."""
    variables = {
        NEW_OUTPUT: "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_PRINT_ALL_TRIAL_ERRORS": str(int(logs)),
        "TUNE_MAX_PENDING_TRIALS_PG": str(trials),
        "TUNE_GLOBAL_CHECKPOINT_S": "600",  # a search resumes from its TrialStore
    }
    logger = logging.getLogger("ray.tune")
    level = logger.level
    if not logs:
        logger.setLevel(logging.CRITICAL)
    try:
        with environment(variables, overwrite=True):
            yield
    finally:
        logger.setLevel(level)
