"""Run the trials of a search, or the members of an ensemble, on the connected cluster.

Texts and pretrained weights are put into the object store once, for all trials of a command.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from raybert.cluster.session import Resources
from raybert.experiment import Experiment
from raybert.pipeline.finetune_setup import input_length
from raybert.storage.folder import Folder
from raybert.tasks.finetune import FinetuneSpec, SharedInputs
from raybert.terminal.display import Display
from raybert.train.ray.driver_channel import DriverChannel
from raybert.train.ray.placement import uses_gpus
from raybert.tune.schedulers import SCHEDULERS
from raybert.tune.search import run_trials
from raybert.tune.search_session import OnTrial, SearchSession
from raybert.tune.settings import SchedulerConfig, TrialConfig
from raybert.tune.space import Space
from raybert.tune.trial import TrialContext
from raybert.tune.trial_resources import trial_resources
from raybert.tune.trial_sources import TrialSource
from raybert.tune.trial_store import TrialStore
from raybert.tune.trial_table import format_end, format_progress, trial_table

_DONOR_CHECKPOINTS = 4  # kept by each trial if others exploit it, which they do some steps later


class TrialRunner:
    """Runs fine-tuning trials of an experiment."""

    def __init__(
        self, experiment: Experiment, display: Display, spec: FinetuneSpec, resources: Resources
    ) -> None:
        """Put the shared inputs into the object store and divide the cluster among trials.

        Raises:
            ConfigError: not even one trial fits on the cluster.
        """
        import ray

        config = experiment.finetune
        self.base = TrialConfig(model=experiment.model, finetune=config)
        self._gpu = uses_gpus(config, resources.gpus)
        self._trial_resources = trial_resources(experiment.tune, config, self._gpu, resources)
        in_process = config.max_workers == 1
        cpus = max(1, int(self._trial_resources.cpus)) if in_process else None
        self._threads = config.threads or cpus
        #: Cores and GPUs of a trial, for its cost.
        self.cores = config.max_workers * float(self._threads or 1)
        self.gpus = (
            self._trial_resources.gpus if in_process else config.max_workers * float(self._gpu)
        )
        self._experiment, self._display, self._spec = experiment, display, spec
        self._resources = resources
        self._shared_inputs = ray.put(SharedInputs.read(spec))
        self._seq_len = input_length(experiment, spec.start, config.seq_len)

    def run(
        self,
        stage: Folder,
        store: TrialStore,
        source: TrialSource,
        *,
        keys: Sequence[str],
        limit: int,
        scheduler: SchedulerConfig | None = None,
        space: Space | None = None,
        longest: float = 1.0,
        deadline: float | None = None,
        on_evaluation: Sequence[OnTrial] = (),
        on_trial_end: Sequence[OnTrial] = (),
        retries: bool = False,
    ) -> None:
        """Run a source's trials to their ends and show their progress.

        Ray Tune gets a temporary folder in `stage`. The table shows the values of `keys`, and the
        progress out of `limit` trials. Without a `scheduler` no trial is stopped early; `space` and
        `longest` are as in `SearchScheduler.build`, `deadline` is one of time.monotonic. With
        `retries`, failed trials keep their checkpoints for a later session.
        """
        scheduler = scheduler or SchedulerConfig(kind="none")
        search_scheduler = SCHEDULERS[scheduler.kind](scheduler)
        ended: deque[str] = deque()  # lines of ended trials, for the main thread to show
        session = SearchSession(
            source,
            store,
            self._trial_resources,
            deadline,
            on_evaluation,
            [*on_trial_end, lambda trial: ended.append(format_end(trial))],
            starts_all=search_scheduler.starts_all,
            keeps_checkpoints=search_scheduler.exploits,
            retries=retries,
        )
        context = TrialContext(
            folder=store.folder,
            base=self.base,
            spec=self._spec,
            shared_inputs=self._shared_inputs,
            seq_len=self._seq_len,
            keep_checkpoints=_DONOR_CHECKPOINTS if search_scheduler.exploits else 1,
            threads=self._threads,
            gpu=self._gpu,
            resources=self._resources,
            channel=DriverChannel(),
        )

        def show() -> None:
            while ended:
                self._display.print(ended.popleft())
            trials = list(source.trials)
            self._display.panel(trial_table(trials, keys), format_progress(trials, limit))

        run_trials(
            context,
            session,
            search_scheduler.build(space, longest, session),
            metric=search_scheduler.metric,
            max_failures=self._experiment.tune.max_failures,
            stage=stage,
            logs=self._experiment.ray.logs,
            show=show,
        )
        show()
