"""`raybert tune`: the search, the finalists' runs, the winner.

`<storage>/<name>/tune/` holds `data/` (the texts), `trials/` and `seeds/` (runs like any other, the
second ones the finalists'), `model/` and `winner.yaml`, and what the report shows. Running it again
goes on from wherever it was left.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from raybert.cluster.session import Resources, dashboard_url, ray_session
from raybert.config import dump
from raybert.data.sources import documents
from raybert.errors import UserError
from raybert.experiment import Experiment
from raybert.jobs.doctor.run_checks import run_requested_checks
from raybert.pipeline.finetune_setup import input_length, prepare_finetune
from raybert.pipeline.stages import METRICS, evaluate_model, measured, shared_file
from raybert.pipeline.trial_runner import Runner
from raybert.storage.folder import Folder
from raybert.tasks.classification import FinetuneSpec
from raybert.terminal.display import Display, clock
from raybert.train.run import CONFIG, RESULT, open_run
from raybert.tune.finalists import Finalist, finalists_of, gathered, runs_of
from raybert.tune.samplers import (
    FixedTrials,
    GridSampler,
    RandomSampler,
    SampledTrials,
    Sampler,
    TpeSampler,
)
from raybert.tune.schedulers.factory import check_scheduler
from raybert.tune.settings import (
    MAY_CHANGE,
    Searched,
    TuneConfig,
    accepts,
    compares_unequal,
    most_epochs,
    read_space,
)
from raybert.tune.space import Space, Values
from raybert.tune.summary import Clock, Cost, result_of, write_trials
from raybert.tune.tensorboard import EventWriter, check_tensorboard, tensorboard
from raybert.tune.trial_store import TrialRecord, TrialStore

WINNER = "winner.yaml"
_SECTIONS = ("model", "finetune")  # that decide a search's result, beside its own


def tune(experiment: Experiment, display: Display, *, dashboard: bool = False) -> dict[str, Any]:
    """Search, run the finalists with several seeds, and write the winner's model.

    Raises:
        ConfigError: a search space, or a cluster, on which nothing can be tried.
        UserError: what the trials start from is not there.
        RaybertError: no trial came to a score.
    """
    stage, config = experiment.folder / "tune", experiment.tune
    if stage.exists(RESULT):
        result = _open(experiment, stage, display)
        assert result is not None
        display.say(f"tune      {stage} is finished already: {_best_line(result)}")
        if result.get("report") is None:
            result = _reported(stage, result, display)
        if config.searcher != "grid" and config.trials > result["trials"]["all"]:
            display.say(
                f"tune      it had {result['trials']['all']} trials, you ask for {config.trials}: "
                "choose another run.name for a longer search"
            )
        return result
    space = read_space(config, Searched(model=experiment.model, finetune=experiment.finetune))
    if config.test:
        documents.peek(experiment.evaluate.source)
    if dashboard:
        check_tensorboard(stage / "tensorboard")
        shown = experiment.ray.model_copy(update={"dashboard": True})
        experiment = experiment.model_copy(update={"ray": shown})
    with ExitStack() as open_until_the_end:
        workers = experiment.finetune.max_workers
        resources = open_until_the_end.enter_context(ray_session(experiment.ray, workers))
        run_requested_checks(experiment, resources, display, ("tune",))
        has_begun = stage.exists(CONFIG)
        job = prepare_finetune(experiment, display, stage / "data", has_begun=has_begun, whole=True)
        job.check()
        tuning = _Tuning(experiment, display, stage, space, job, resources)
        tuning.check()  # a search that is refused has not begun: its name stays free
        _open(experiment, stage, display, job)
        tuning.tell()
        if dashboard:
            events = open_until_the_end.enter_context(tensorboard(stage / "tensorboard"))
            display.say(f"tune      dashboards: Ray {dashboard_url()}, TensorBoard {events}")
        return tuning.run()


def _open(
    experiment: Experiment, stage: Folder, display: Display, job: FinetuneSpec | None = None
) -> dict[str, Any] | None:
    return open_run(
        stage,
        dump(experiment),
        "tune",
        _SECTIONS,
        inputs=None if job is None else job.inputs(),
        tell=lambda text: display.say(f"tune      {text}"),
        may_change=MAY_CHANGE,
    )


@dataclass(frozen=True)
class _Timer:
    """Writes down how long the search has taken, as often as a trial ends."""

    clock: Clock
    begun: float

    def evaluated(self, entry: TrialRecord) -> None:
        pass

    def ended(self, entry: TrialRecord) -> None:
        self.clock.write(time.monotonic() - self.begun)


class _Tuning:
    """One session of a search."""

    def __init__(
        self,
        experiment: Experiment,
        display: Display,
        stage: Folder,
        space: Space,
        job: FinetuneSpec,
        resources: Resources,
    ) -> None:
        self._experiment, self._display, self._stage = experiment, display, stage
        self._config: TuneConfig = experiment.tune
        self._space, self._job = space, job
        self._check_lengths()
        self._runner = Runner(experiment, display, job, resources)
        self._keys = [dimension.key for dimension in space.dimensions]
        self._clock, self._begun = Clock.read(stage), time.monotonic()
        self._seen: str | None = None  # a file of the test texts that is trained on

    def check(self) -> None:
        """Refuse what can't be searched so.

        Raises:
            ConfigError: values of the space, or a scheduler, of which nothing can come.
        """
        self._proposer(self._start())
        check_scheduler(self._config.scheduler, self._longest())

    def tell(self) -> None:
        """Say what the result will be worth."""
        if self._config.test:
            self._seen = shared_file(
                self._experiment.finetune.source, self._experiment.evaluate.source
            )
        if self._seen is not None:
            self._display.say(
                f"tune      {self._seen} is trained on: the winner's test scores will say little "
                "about new texts; name others with --set evaluate.source.path=FILE"
            )
        if compares_unequal(self._config, self._space, self._runner.base):
            count = self._runner.base.finetune.evaluations
            self._display.say(
                f"tune      finetune.evaluations={count} is spread over each trial's own length: "
                "trials are compared after unequal epochs; null evaluates after every epoch"
            )

    def run(self) -> dict[str, Any]:
        try:
            with self._display.stage("tune"):
                entries = self._search()
                finalists = self._run_finalists(entries)
        finally:
            self._clock.write(time.monotonic() - self._begun)
        spent = self._clock.before + time.monotonic() - self._begun
        return self._finish(entries, finalists, spent)

    def _search(self) -> list[TrialRecord]:
        """Run the trials of the search; returns all of them."""
        config = self._config
        ledger = TrialStore(self._stage / "trials")
        start = self._start()
        proposer, limit = self._proposer(start)
        trials = SampledTrials(ledger, proposer, start, limit, self._experiment.finetune.seed)
        left = None if config.minutes is None else config.minutes * 60 - self._clock.before
        self._runner.run(
            self._stage,
            ledger,
            trials,
            keys=self._keys,
            limit=limit,
            scheduler=config.scheduler,
            space=self._space,
            longest=self._longest(),
            deadline=None if left is None else time.monotonic() + left,
            watchers=[
                EventWriter(self._stage / "tensorboard"),
                _Timer(self._clock, self._begun),
            ],
        )
        for entry in trials.entries:
            if entry.state == "waiting":  # its time was up before it could go on
                ledger.close(entry, "stopped", "the time was up")
        return trials.entries

    def _start(self) -> list[Values]:
        """The values of the first trials: the configured ones, then those that are asked for."""
        settings = self._runner.base.settings()
        asked = [
            {**self._space.of({**settings, **values}), **values} for values in self._config.start
        ]
        return [self._space.of(settings), *asked]

    def _longest(self) -> float:
        """The epochs of the longest trial."""
        rows, batch = self._job.prepared.train.rows, self._experiment.finetune.global_batch_size
        steps_per_epoch = max(1, -(-rows // batch))
        return most_epochs(self._space, self._runner.base, steps_per_epoch, self._tokens())

    def _proposer(self, start: list[Values]) -> tuple[Sampler, int]:
        """What chooses values after the first ones, and how many trials there are in all."""
        config, base = self._config, self._runner.base

        def accepted(values: Values) -> bool:
            return accepts(base, values)

        if config.searcher == "grid":
            grid = GridSampler(self._space, len(start), accepted, but=start)
            return grid, len(start) + len(grid)
        if config.searcher == "random":
            return RandomSampler(self._space, config.seed, accepted), config.trials
        startup = max(4, min(10, config.trials // 3))
        return TpeSampler(self._space, config.seed, startup, accepted), config.trials

    def _run_finalists(self, entries: list[TrialRecord]) -> list[Finalist]:
        """Run the best few, and the configured values, with several seeds."""
        config = self._config
        finalists = finalists_of(entries, config.finalists)
        names = ", ".join(finalist.name for finalist in finalists)
        self._display.say(f"tune      {config.seeds} seeds of each finalist: {names}")
        ledger = TrialStore(self._stage / "seeds")
        wanted = runs_of(finalists, self._experiment.finetune.seed, config.seeds)
        source = FixedTrials(ledger, wanted)
        self._runner.run(self._stage, ledger, source, keys=self._keys, limit=len(wanted))
        found = gathered(finalists, source.entries, self._job.prepared.validation.rows)
        if any(other.mean > found[0].mean for other in found):
            self._display.say(
                "tune      no finalist is above the configured values by more than a standard "
                "error of the seeds and the validation texts: they stay"
            )
        return found

    def _finish(
        self, entries: list[TrialRecord], finalists: list[Finalist], spent: float
    ) -> dict[str, Any]:
        """Write the winner's model, look at the test texts once, and tell what came of it."""
        stage, config, display = self._stage, self._config, self._display
        winner = finalists[0]
        run = winner.best_run()
        (stage / "seeds" / run.name / "model").copy_to(stage / "model", last="config.json")
        stage.write_text(WINNER, dump(self._winning(run)))
        runs = [run for finalist in finalists for run in finalist.runs]
        cost = Cost.of([*entries, *runs], self._runner.cores, self._runner.gpus)
        write_trials(
            stage, self._space, entries, finalists, cost, config.scheduler.kind, config.searcher
        )
        result = result_of(entries, finalists, cost, spent)
        result |= {"model": (stage / "model").uri, "config": (stage / WINNER).uri, "run": run.name}
        if config.test:
            metrics = measured(self._experiment, stage)  # by a session that was killed since
            if metrics is None:
                metrics = evaluate_model(self._experiment, stage / "model", display)
                stage.write_json(METRICS, metrics)
            result["test"] = {key: metrics[key] for key in ("accuracy", "loss", "f1_macro", "n")}
            result["test"]["seen_in_training"] = self._seen is not None
        stage.delete("ray")  # what sessions that were killed have left
        result = _reported(stage, result, display)
        # Only now: a session that is killed before the result stands needs these again.
        if not config.keep_models:
            for folder, trials in (("trials", entries), ("seeds", runs)):
                for entry in trials:
                    (stage / folder / entry.name).delete("model")
        display.say(f"tune      {_best_line(result)}; model in {result['model']}")
        return result

    def _winning(self, run: TrialRecord) -> Experiment:
        """The experiment with the winner's values and seed."""
        won = self._runner.base.with_values({**run.values, "finetune.seed": run.seed})
        return self._experiment.model_copy(update={"model": won.model, "finetune": won.finetune})

    def _check_lengths(self) -> None:
        for dimension in self._space.dimensions:
            if dimension.key == "finetune.seq_len":
                for value in dimension.ends:
                    input_length(self._experiment, self._job.start, value)

    def _tokens(self) -> int:
        """Tokens of an epoch, for limits that are given in them."""
        if self._experiment.finetune.tokens is None:
            return 1
        from raybert.tasks.texts import Texts

        return int(Texts.load(self._job.data, self._job.prepared.train).lengths.sum())


def _reported(stage: Folder, result: dict[str, Any], display: Display) -> dict[str, Any]:
    """Write the report, then the result, by which a search counts as finished; returns that."""
    from raybert.report import write_report

    result = {**result, "report": None}
    try:
        write_report(stage, result)
        result["report"] = (stage / "report.html").uri
    except UserError as error:  # the result is worth no less without it
        display.say(f"report    none: {error}")
    stage.write_json(RESULT, result)
    return result


def _best_line(result: dict[str, Any]) -> str:
    best, default = result["best"]["seeds"]["accuracy"], result["default"]
    parts = [f"trial {result['best']['trial']}, validation accuracy {_mean(best)}"]
    if default is not None:
        parts.append(f"the configured values {_mean(default['seeds']['accuracy'])}")
    if "test" in result:
        parts.append(f"test accuracy {result['test']['accuracy']:.4f}")
    return f"{', '.join(parts)}, in {clock(result['seconds'])}"


def _mean(spread: dict[str, Any]) -> str:
    if spread["mean"] is None:
        return "none"
    return f"{spread['mean']:.4f}" + ("" if spread["std"] is None else f" ± {spread['std']:.4f}")
