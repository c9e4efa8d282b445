"""Run the trials of a search on Ray Tune.

Ray Tune starts the workers, reuses them for the next trials and applies the scheduler. Its own
checkpoints of a search, pickles that lag behind the trials, are not used: a search that was killed
is resumed as a new one of Ray Tune's, from the trials in the TrialStore.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray.tune
from ray.tune.experiment import Experiment, Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search.search_algorithm import SearchAlgorithm

from raybert.cluster.internals.tune import NEW_OUTPUT
from raybert.cluster.session import environment
from raybert.errors import RaybertError, Superseded
from raybert.storage.folder import Folder
from raybert.train.ray.driver_channel import DriverChannel
from raybert.train.ray.fit_thread import run_fit
from raybert.tune.search_session import SearchSession
from raybert.tune.trial import FinetuneTrial, TrialContext
from raybert.tune.trial_store import TrialRecord


def run_trials(
    context: TrialContext,
    session: SearchSession,
    scheduler: TrialScheduler,
    *,
    metric: str,
    max_failures: int,
    stage: Folder,
    logs: bool,
    show: Callable[[], None],
) -> None:
    """Run a session's trials to their ends.

    The scheduler compares the `metric` of results. `stage` is the folder in which Ray Tune gets a
    temporary one, `logs` lets it print, and `show` is called twice a second.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; running trials have saved a checkpoint.
        Superseded: another driver runs the same search.
        RaybertError: Ray Tune itself failed.
    """
    scratch, name = stage / "ray", f"attempt-{time.time_ns()}"
    arguments: dict[str, Any] = {
        "name": name,
        "metric": metric,
        "mode": "max",
        "resources_per_trial": ray.tune.PlacementGroupFactory([session.resources.request]),
        "storage_path": scratch.path,
        "storage_filesystem": scratch.filesystem,
        "search_alg": SessionSearch(session),
        "scheduler": scheduler,
        "checkpoint_config": ray.tune.CheckpointConfig(checkpoint_at_end=False),
        "callbacks": [SessionCallback(session)],
        "max_failures": max_failures,
        "reuse_actors": True,
        "raise_on_failed_trial": False,
        "verbose": 0,
    }
    trainable = ray.tune.with_parameters(FinetuneTrial, context=context)

    def poll() -> None:
        _read_progress(context.channel, session.source.trials)
        show()

    def on_interrupt() -> None:
        session.is_stopping = True

    with _tune_settings(session.resources.trials, logs):
        error = run_fit(
            lambda: ray.tune.run(trainable, **arguments),
            context.channel,
            poll,
            on_interrupt=on_interrupt,
        )
    if isinstance(error, RaybertError):
        raise error
    if error is not None:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RaybertError(f"the search failed: {lines[-1]}") from error
    if session.superseded is not None:
        raise Superseded(session.superseded)
    session.delete_checkpoints()
    scratch.delete(name)
    if not scratch.names(hidden=True):  # another driver's attempt may be running there
        stage.delete("ray")


class SessionSearch(SearchAlgorithm):  # type: ignore[misc]  # of an untyped package
    """Gives the session's trials to Ray Tune, one by one."""

    def __init__(self, session: SearchSession) -> None:
        self._session = session
        self._spec: dict[str, Any] = {}

    def add_configurations(self, experiments: list[Experiment]) -> None:
        """Keep what all trials of the experiment have in common."""
        [experiment] = experiments
        self._spec = experiment.spec

    def next_trial(self) -> Trial | None:
        """Make Ray Tune's trial of the session's next one; it waits if the cluster is full."""
        record = self._session.next()
        if record is None:
            return None
        spec = self._spec
        trial = Trial(
            spec["run"],
            config={"seed": record.seed, **record.values},
            trial_id=record.name,
            evaluated_params=record.values,
            experiment_tag=record.name,
            storage=spec["storage"],
            placement_group_factory=spec["resources_per_trial"],
            checkpoint_config=spec["checkpoint_config"],
            max_failures=spec["max_failures"],
        )
        if self._session.is_full:
            trial.set_status(Trial.PAUSED)
        self._session.running[record.name] = trial
        return trial

    def is_finished(self) -> bool:
        """Whether Ray Tune may end idle workers; paused and exploiting trials reuse them."""
        return self._session.is_over and self._session.is_idle


class SessionCallback(ray.tune.Callback):  # type: ignore[misc]
    """Passes Ray Tune's events to the session."""

    def __init__(self, session: SearchSession) -> None:
        self._session = session

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """Mark a trial as running."""
        self._session.record_of(trial).state = "running"

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        """Record an evaluation."""
        self._session.on_result(trial, result)

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **_: Any
    ) -> None:
        """Record the end of a trial."""
        self._session.on_end(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """Record the failure of a trial whose worker was lost `max_failures` times."""
        self._session.on_end(trial, _format_lost_worker(trial))


def _format_lost_worker(trial: Trial) -> str:
    text = ""
    with suppress(OSError, TypeError):
        with open(trial.error_file, encoding="utf-8", errors="replace") as file:
            text = file.read()
    # Ray's own words: a process that the kernel kills leaves no message.
    is_memory = "OutOfMemory" in text or "low on memory" in text
    reason = "its node ran out of memory" if is_memory else "its worker was lost"
    return reason if trial.num_failures == 1 else f"{reason}, {trial.num_failures} times"


def _read_progress(channel: DriverChannel, trials: Sequence[TrialRecord]) -> None:
    """Update the trials' steps from the records that their workers sent."""
    with suppress(Exception):  # only the display needs them
        known = {trial.name: trial for trial in trials}
        for record in channel.receive():
            trial = known.get(record.get("trial", ""))
            if trial is not None:
                trial.step, trial.total_steps = record["step"], record.get("total_steps")


@contextmanager
def _tune_settings(trials: int, logs: bool) -> Iterator[None]:
    """Set Ray Tune's environment: no printing, no log files, `trials` starts at a time."""
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
