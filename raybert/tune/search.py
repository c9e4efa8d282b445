"""Run the trials of a search, or the members of an ensemble, on Ray Tune.

Ray Tune starts the workers, reuses them for the next trials and applies the scheduler. Its own
checkpoints of a search, pickles that lag behind the trials, are not used: a search that was killed
is resumed as a new one of Ray Tune's, from the trials in the TrialStore.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import ray
import ray.tune
from ray.tune.experiment import Experiment, Trial
from ray.tune.search.search_algorithm import SearchAlgorithm

from raybert.cluster.internals.tune import NEW_OUTPUT
from raybert.cluster.session import Resources, environment
from raybert.errors import RaybertError, Superseded
from raybert.storage.folder import Folder
from raybert.tasks.finetune import FinetuneSpec, SharedInputs
from raybert.terminal.display import Display
from raybert.train.ray.driver_channel import DriverChannel, run_fit
from raybert.train.ray.placement import uses_gpus
from raybert.tune.schedulers.scheduler import NoScheduler, SchedulerConfig, SearchScheduler
from raybert.tune.search_session import OnTrial, SearchSession, TrialSource
from raybert.tune.settings import TrialConfig, TuneConfig
from raybert.tune.space import Space
from raybert.tune.trial import FinetuneTrial, TrialContext
from raybert.tune.trial_resources import trial_resources
from raybert.tune.trial_store import TrialRecord
from raybert.tune.trial_table import format_end, format_progress, trial_table

_DONOR_CHECKPOINTS = 4  # kept by each trial if others exploit it, which they do some steps later


class TrialRunner:
    """Runs fine-tuning trials of one stage on the connected cluster and shows their progress."""

    def __init__(
        self,
        config: TuneConfig,
        spec: FinetuneSpec,
        resources: Resources,
        stage: Folder,
        display: Display,
        seq_len: int,
        logs: bool,
    ) -> None:
        """Put texts and pretrained weights into the object store, once for all trials.

        Ray Tune gets a temporary folder in `stage`; `seq_len` is that of trials that do not set it;
        with `logs` Ray Tune prints. A ConfigError if not even one trial fits on the cluster.
        """
        training = spec.config
        self.base = TrialConfig(model=spec.model, finetune=training)
        gpu = uses_gpus(training, resources.gpus)
        each = trial_resources(config, training, gpu, resources)
        in_process, workers = training.max_workers == 1, training.max_workers
        cpus = max(1, int(each.cpus)) if in_process else None
        self._threads = training.threads or cpus
        #: Cores and GPUs of a trial, for its cost.
        self.cores = workers * float(self._threads or 1)
        self.gpus = each.gpus if in_process else workers * float(gpu)
        self._config, self._spec, self._gpu, self._each = config, spec, gpu, each
        self._resources, self._stage, self._display = resources, stage, display
        self._seq_len, self._logs = seq_len, logs
        self._shared_inputs = ray.put(SharedInputs.read(spec))

    def run(
        self,
        source: TrialSource,
        scheduler: SearchScheduler | None = None,
        space: Space | None = None,
        *,
        longest: float = 1.0,
        deadline: float | None = None,
        on_evaluation: Sequence[OnTrial] = (),
        on_trial_end: Sequence[OnTrial] = (),
    ) -> None:
        """Run a source's trials to their ends; without a scheduler none is stopped early.

        `space` and `longest` are as in `SearchScheduler.build`; `deadline` is of time.monotonic.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; running trials have saved a checkpoint.
            Superseded: another driver runs the same search.
            RaybertError: Ray Tune itself failed.
        """
        scheduler = scheduler or NoScheduler(SchedulerConfig(kind="none"))
        ended: deque[str] = deque()  # lines of ended trials, for the main thread to show
        session = SearchSession(
            source,
            self._each.trials,
            deadline,
            on_evaluation,
            [*on_trial_end, lambda trial: ended.append(format_end(trial))],
            starts_all=scheduler.starts_all,
            keeps_checkpoints=scheduler.exploits,
        )
        context = TrialContext(
            folder=source.store.folder,
            base=self.base,
            spec=self._spec,
            shared_inputs=self._shared_inputs,
            seq_len=self._seq_len,
            keep_checkpoints=_DONOR_CHECKPOINTS if scheduler.exploits else 1,
            threads=self._threads,
            gpu=self._gpu,
            resources=self._resources,
            channel=DriverChannel(),
        )
        keys = [] if space is None else [dimension.key for dimension in space.dimensions]

        def show() -> None:
            while ended:
                self._display.print(ended.popleft())
            trials = list(source.trials)
            self._display.panel(trial_table(trials, keys), format_progress(trials, source.limit))

        def poll() -> None:
            _read_progress(context.channel, source.trials)
            show()

        def on_interrupt() -> None:
            session.is_stopping = True

        scratch, name = self._stage / "ray", f"attempt-{time.time_ns()}"
        arguments: dict[str, Any] = {
            "name": name,
            "metric": scheduler.metric,
            "mode": "max",
            "resources_per_trial": ray.tune.PlacementGroupFactory([self._each.request]),
            "storage_path": scratch.path,
            "storage_filesystem": scratch.filesystem,
            "search_alg": SessionSearch(session),
            "scheduler": scheduler.build(space, longest, session),
            "checkpoint_config": ray.tune.CheckpointConfig(checkpoint_at_end=False),
            "callbacks": [SessionCallback(session)],
            "max_failures": self._config.max_failures,
            "reuse_actors": True,
            "raise_on_failed_trial": False,
            "verbose": 0,
        }
        trainable = ray.tune.with_parameters(FinetuneTrial, context=context)
        with _tune_settings(self._each.trials, self._logs):
            fit = partial(ray.tune.run, trainable, **arguments)
            error = run_fit(fit, context.channel, poll, on_interrupt=on_interrupt)
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
            self._stage.delete("ray")
        show()


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

    def on_trial_start(self, *, trial: Trial, **_: Any) -> None:
        """Mark a trial as running."""
        self._session.record_of(trial).state = "running"

    def on_trial_result(self, *, trial: Trial, result: dict[str, Any], **_: Any) -> None:
        """Record an evaluation."""
        self._session.on_result(trial, result)

    def on_trial_complete(self, *, trial: Trial, **_: Any) -> None:
        """Record the end of a trial."""
        self._session.on_end(trial)

    def on_trial_error(self, *, trial: Trial, **_: Any) -> None:
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
