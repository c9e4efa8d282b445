"""`raybert tune`: search over fine-tuning settings, rerun the finalists, write the winner's model.

`<storage>/<name>/tune/` holds `data/` (the texts), `trials/` (the trials' runs), `seeds/` (the
finalists' runs), `model/`, `winner.yaml` and the report. Running the command again resumes it.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from raybert.cluster.session import Resources, dashboard_url
from raybert.config import dump
from raybert.errors import damaged_file
from raybert.experiment import Experiment
from raybert.jobs.doctor.run_checks import run_requested_checks
from raybert.pipeline import baseline_stage
from raybert.pipeline.finetune_setup import (
    input_length,
    known_inputs,
    peek_evaluation,
    peek_training,
    prepare_finetune,
    starting_point,
)
from raybert.pipeline.named_sources import with_sources
from raybert.pipeline.ray_stage import shown_ray_session
from raybert.pipeline.stages import find_shared_file
from raybert.pipeline.tune_result import (
    Cost,
    SearchClock,
    finish_search,
    format_best,
    write_report_and_result,
)
from raybert.storage.folder import Folder
from raybert.tasks.finetune import FinetuneSpec
from raybert.tasks.prepared_texts import check_same_texts
from raybert.tasks.tokenized_texts import TokenizedTexts
from raybert.terminal.display import Display
from raybert.train.run_folder import CONFIG, RESULT, open_run
from raybert.tune.finalists import Finalist, choose_finalists, finalist_runs, rank_finalists
from raybert.tune.samplers import SAMPLERS, Sampler
from raybert.tune.schedulers import SCHEDULERS
from raybert.tune.search import TrialRunner
from raybert.tune.search_session import OUT_OF_TIME, FixedTrials, SampledTrials
from raybert.tune.settings import MAY_CHANGE, TrialConfig, TuneConfig
from raybert.tune.space import Space, Values
from raybert.tune.space_checks import has_unequal_rungs, longest_epochs, read_space
from raybert.tune.tensorboard import EventWriter, check_tensorboard, tensorboard
from raybert.tune.trial_store import TrialRecord, TrialStore

_SECTIONS = ("model", "finetune")  # that affect the result of a search, beside `tune`


def tune(experiment: Experiment, display: Display, *, dashboard: bool = False) -> dict[str, Any]:
    """Run the search and its finalists, write model and report; returns `result.json`.

    `dashboard` starts Ray's dashboard and TensorBoard.
    """
    experiment = with_sources(experiment)
    stage, config = experiment.folder / "tune", experiment.tune
    if stage.exists(RESULT):
        return _finished_search(experiment, stage, display)
    base = TrialConfig(model=experiment.model, finetune=experiment.finetune)
    read_space(config, base)  # mistakes that need no texts
    if experiment.finetune.unlabelled is not None:
        display.print(
            "tune      finetune.unlabelled is left out: only `raybert finetune` reads such texts"
        )
    starting_point(experiment)
    if config.test:
        peek_evaluation(experiment)
    elif not stage.exists(CONFIG):
        peek_training(experiment)
    if dashboard:
        check_tensorboard(stage / "tensorboard")
        with_dashboard = experiment.ray.model_copy(update={"dashboard": True})
        experiment = experiment.model_copy(update={"ray": with_dashboard})
    with ExitStack() as stack:
        workers = experiment.finetune.max_workers
        resources = stack.enter_context(shown_ray_session(experiment, display, workers))
        run_requested_checks(experiment, resources, display, ("tune",))
        has_begun = stage.exists(CONFIG)
        spec = prepare_finetune(
            experiment,
            display,
            stage / "data",
            has_begun=has_begun,
            full_length=True,
            fit_baseline=baseline_stage.fitter(experiment, display, stage / "baseline"),
        )
        spec.check()
        space = read_space(config, base, type(spec.prepared.make_task()))
        for dimension in space.dimensions:
            if dimension.key == "finetune.seq_len":  # rejects lengths that the model lacks
                for value in dimension.ends:
                    input_length(experiment, spec.start, value)
        search = Search(experiment, display, stage, space, spec, resources)
        search.check()
        # Only now: the name of a search that was rejected stays free.
        open_search(experiment, stage, display, spec)
        search.warn()
        if dashboard:
            url = stack.enter_context(tensorboard(stage / "tensorboard"))
            display.print(f"tune      dashboards: Ray {dashboard_url()}, TensorBoard {url}")
        return search.run()


def open_search(
    experiment: Experiment, stage: Folder, display: Display, spec: FinetuneSpec | None = None
) -> dict[str, Any] | None:
    """Create or reopen the search's folder, as `open_run`."""
    result = open_run(
        stage,
        dump(experiment),
        "tune",
        _SECTIONS,
        inputs=known_inputs(experiment) if spec is None else spec.inputs(),
        log=lambda text: display.print(f"tune      {text}"),
        may_change=MAY_CHANGE,
    )
    check_same_texts(experiment.finetune, stage / "data")
    return result


def _finished_search(experiment: Experiment, stage: Folder, display: Display) -> dict[str, Any]:
    """The result of a search that is finished; makes the report if it is missing."""
    result = open_search(experiment, stage, display)
    assert result is not None
    with damaged_file(stage.join(RESULT)):
        display.print(f"tune      {stage} is finished already: {format_best(result)}")
    if result.get("report") is None:
        result = write_report_and_result(stage, result, display)
    config, done = experiment.tune, result["trials"]["all"]
    if config.searcher != "grid" and config.trials > done:
        display.print(
            f"tune      it had {done} trials, you ask for {config.trials}: choose another run.name "
            "for a longer search"
        )
    return result


class Search:
    """One session of a search."""

    def __init__(
        self,
        experiment: Experiment,
        display: Display,
        stage: Folder,
        space: Space,
        spec: FinetuneSpec,
        resources: Resources,
    ) -> None:
        self._experiment, self._display, self._stage = experiment, display, stage
        self._config: TuneConfig = experiment.tune
        self._space, self._spec = space, spec
        seq_len = input_length(experiment, spec.start, spec.config.seq_len)
        self._runner = TrialRunner(
            self._config, spec, resources, stage, display, seq_len, experiment.ray.logs
        )
        kind = self._config.scheduler.kind
        self._scheduler = SCHEDULERS[kind](self._config.scheduler)
        self._clock = SearchClock(stage)
        self._seen_file: str | None = None  # a file of the test texts that trials train on

    def check(self) -> None:
        """Raise a ConfigError if no values of the space are valid or no trial could be stopped."""
        self._sampler(self._start_values())
        self._scheduler.check_epochs(self._longest())

    def warn(self) -> None:
        """Warn of settings that make the results less meaningful."""
        if self._config.test:
            self._seen_file = find_shared_file(
                self._experiment.finetune.source, self._experiment.evaluate.source
            )
        if self._seen_file is not None:
            self._display.print(
                f"tune      {self._seen_file} is trained on: the winner's test scores will say "
                "little about new texts; name others with --set evaluate.source.path=FILE"
            )
        if has_unequal_rungs(self._config, self._space, self._runner.base):
            count = self._runner.base.finetune.evaluations
            self._display.print(
                f"tune      finetune.evaluations={count} is spread over each trial's own length: "
                "trials are compared after unequal epochs; null evaluates after every epoch"
            )

    def run(self) -> dict[str, Any]:
        """Run the trials, then the finalists, and write the winner; returns the result."""
        try:
            with self._display.stage("tune"):
                trials = self._run_trials()
                finalists = self._run_finalists(trials)
        finally:
            self._clock.write()
        seconds = self._clock.seconds
        runs = [run for finalist in finalists for run in finalist.runs]
        cost = Cost.of([*trials, *runs], self._runner.cores, self._runner.gpus)
        return finish_search(
            self._experiment,
            self._display,
            self._space,
            trials,
            finalists,
            cost=cost,
            seconds=seconds,
            seen_in_training=self._seen_file is not None,
        )

    def _run_trials(self) -> list[TrialRecord]:
        config, start = self._config, self._start_values()
        store, sampler = TrialStore(self._stage / "trials"), self._sampler(start)
        limit, seed = sampler.count(config.trials), self._experiment.finetune.seed
        source = SampledTrials(store, sampler, start, limit, seed)
        deadline = None
        if config.minutes is not None:
            deadline = time.monotonic() + config.minutes * 60 - self._clock.earlier
        events = EventWriter(self._stage / "tensorboard")
        self._runner.run(
            source,
            self._scheduler,
            self._space,
            longest=self._longest(),
            deadline=deadline,
            on_evaluation=[events.on_evaluation],
            on_trial_end=[events.on_trial_end, lambda trial: self._clock.write()],
        )
        for trial in source.trials:
            if trial.state == "waiting":  # the deadline came before it was resumed
                store.close(trial, "stopped", OUT_OF_TIME)
        return source.trials

    def _run_finalists(self, trials: list[TrialRecord]) -> list[Finalist]:
        """Run the best trials and the configured values with several seeds; the winner is first."""
        config = self._config
        finalists = choose_finalists(trials, config.finalists)
        names = ", ".join(finalist.name for finalist in finalists)
        self._display.print(f"tune      {config.seeds} seeds of each finalist: {names}")
        store = TrialStore(self._stage / "seeds")
        wanted = finalist_runs(finalists, self._experiment.finetune.seed, config.seeds)
        source = FixedTrials(store, wanted)
        self._runner.run(source, space=self._space)
        ranking = rank_finalists(finalists, source.trials, self._spec.prepared.validation.rows)
        if any(other.mean > ranking[0].mean for other in ranking):
            self._display.print(
                "tune      no finalist is better than the configured values by more than a "
                "standard error of the seeds and the validation texts: they stay"
            )
        return ranking

    def _start_values(self) -> list[Values]:
        settings = self._runner.base.flat()
        return [
            {**self._space.of({**settings, **values}), **values}
            for values in [{}, *self._config.start]
        ]

    def _sampler(self, start: list[Values]) -> Sampler:
        config = self._config
        return SAMPLERS[config.searcher](
            self._space, start, config.seed, config.trials, self._runner.base.accepts
        )

    def _longest(self) -> float:
        finetune, train = self._experiment.finetune, self._spec.prepared.train
        steps_per_epoch = max(1, -(-train.rows // finetune.global_batch_size))
        tokens_per_epoch = 1
        if finetune.tokens is not None:
            tokens_per_epoch = int(TokenizedTexts.load(self._spec.data, train).lengths.sum())
        return longest_epochs(self._space, self._runner.base, steps_per_epoch, tokens_per_epoch)
