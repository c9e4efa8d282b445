"""Running trials: what a search and an ensemble have in common.

Texts and pretrained weights are put into the object store once, for all trials of a command.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from raybert.cluster.session import Resources
from raybert.experiment import Experiment
from raybert.pipeline.finetune_setup import input_length
from raybert.storage.folder import Folder
from raybert.tasks.classification import FinetuneSpec, SharedInputs
from raybert.terminal.display import Display
from raybert.train.ray.driver_channel import DriverChannel
from raybert.train.ray.placement import uses_gpus
from raybert.tune import trial_table
from raybert.tune.schedulers.factory import make_scheduler
from raybert.tune.search import run_trials
from raybert.tune.search_session import Session, TrialListener, TrialSource, trial_resources
from raybert.tune.settings import SchedulerConfig, Searched
from raybert.tune.space import Space
from raybert.tune.trial import TrialContext
from raybert.tune.trial_store import TrialRecord, TrialStore

_KEPT = 4  # checkpoints of each trial that others may take over: the takers may be late


class Runner:
    """Runs trials of an experiment's fine-tuning, whoever chooses their values."""

    def __init__(
        self, experiment: Experiment, display: Display, job: FinetuneSpec, resources: Resources
    ) -> None:
        """Put what trials share into the object store, and see how much room there is."""
        import ray

        config = experiment.finetune
        self.base = Searched(model=experiment.model, finetune=config)
        self.gpu = uses_gpus(config, resources.gpus)
        self.room = trial_resources(experiment.tune, config, self.gpu, resources)
        # Of one that trains in its own process; Ray Train's workers share their machine's cores.
        alone = config.max_workers == 1
        self.threads = config.threads or (max(1, int(self.room.cpus)) if alone else None)
        #: What a trial takes of the machines, for its cost.
        self.cores = config.max_workers * float(self.threads or 1)
        self.gpus = self.room.gpus if alone else config.max_workers * float(self.gpu)
        self._experiment, self._display, self._job = experiment, display, job
        self._resources = resources
        self._held = ray.put(SharedInputs.read(job))
        self._seq_len = input_length(experiment, job.start, config.seq_len)

    def run(
        self,
        stage: Folder,
        ledger: TrialStore,
        source: TrialSource,
        *,
        keys: Sequence[str],
        limit: int | None,
        scheduler: SchedulerConfig | None = None,
        space: Space | None = None,
        longest: float = 1.0,
        deadline: float | None = None,
        watchers: Sequence[TrialListener] = (),
        retries: bool = False,
    ) -> None:
        """Run a source's trials to their ends, and show how they go.

        Args:
            stage: a folder, inside of which Ray Tune has one to write in.
            ledger: of the trials.
            source: gives them.
            keys: of their values, as far as there is room to show them.
            limit: how many there will be in all; None: unknown.
            scheduler: who goes on; None: all of them.
            space: that trials may be moved in while they run.
            longest: epochs of the longest trial.
            deadline: of time.monotonic, after which no trial begins or goes on.
            watchers: hear how each trial goes.
            retries: whether trials that fail keep their checkpoints, for a later session.
        """
        scheduler = scheduler or SchedulerConfig(kind="none")
        exchanges = scheduler.kind == "pbt"
        told: deque[str] = deque()
        session = Session(
            source,
            ledger,
            self.room,
            deadline,
            [*watchers, _Teller(told)],
            all_at_once=scheduler.kind in ("pbt", "hyperband"),
            keeps_checkpoints=exchanges,
            retries=retries,
        )
        work = TrialContext(
            folder=ledger.folder,
            base=self.base,
            job=self._job,
            held=self._held,
            seq_len=self._seq_len,
            keep_checkpoints=_KEPT if exchanges else 1,
            threads=self.threads,
            gpu=self.gpu,
            resources=self._resources,
            board=DriverChannel(),
        )

        def show() -> None:
            while told:
                self._display.say(told.popleft())
            entries = list(source.entries)
            line = trial_table.line_of(entries, limit)
            self._display.panel(trial_table.table_of(entries, keys), line)

        run_trials(
            work,
            session,
            make_scheduler(scheduler, space, longest, session),
            max_failures=self._experiment.tune.max_failures,
            stage=stage,
            logs=self._experiment.ray.logs,
            show=show,
        )
        show()


@dataclass(frozen=True)
class _Teller:
    """Collects how each trial ended; shown by the main thread."""

    told: deque[str]

    def evaluated(self, entry: TrialRecord) -> None:
        pass

    def ended(self, entry: TrialRecord) -> None:
        self.told.append(trial_table.ended_line(entry))
