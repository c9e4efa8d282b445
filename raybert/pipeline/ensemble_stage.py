"""`raybert finetune --seeds N`: fine-tune with several seeds and measure the ensemble.

`<storage>/<name>/ensemble/` holds `data/`, `members/` (the runs) and `ensemble.json`, with which
`--distill-from` finds the members.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from raybert.config import dump
from raybert.data.preprocess import Preprocessing
from raybert.data.tokenizer import Tokenizer
from raybert.errors import RaybertError, damaged_file
from raybert.experiment import Experiment
from raybert.jobs.doctor.run_checks import run_requested_checks
from raybert.pipeline.finetune_setup import (
    known_inputs,
    peek_training,
    prepare_finetune,
)
from raybert.pipeline.named_sources import with_sources
from raybert.pipeline.ray_stage import shown_ray_session
from raybert.records import finite, format_mean, metric_of
from raybert.storage.folder import Folder
from raybert.tasks.finetune import FinetuneSpec
from raybert.tasks.prepared_texts import check_same_texts
from raybert.tasks.protocol import Outputs
from raybert.tasks.tokenized_texts import TokenizedTexts
from raybert.terminal.display import Display
from raybert.terminal.formats import clock, mean_and_deviation
from raybert.train.run_folder import CONFIG, RESULT, dotted, open_run
from raybert.train.settings import ALIKE_MAY_CHANGE
from raybert.tune.search import TrialRunner
from raybert.tune.search_session import FixedTrials
from raybert.tune.space import Values
from raybert.tune.trial_store import TrialRecord, TrialStore

_SCORES = ("accuracy", "loss", "f1_macro", "expected_calibration_error")


def finetune_seeds(experiment: Experiment, display: Display, seeds: int) -> dict[str, Any]:
    """Fine-tune with several seeds; measure each member and their ensemble."""
    experiment, stage = with_sources(experiment), experiment.folder / "ensemble"
    if stage.exists(RESULT):
        result = _open_ensemble(experiment, stage)
        with damaged_file(stage.join(RESULT)):
            if result is not None and len(result["members"]) == seeds:
                display.print(f"ensemble  {stage} is finished already: {_format_result(result)}")
                return result
        stage.delete(RESULT)  # the number of members has changed
    has_begun = stage.exists(CONFIG)
    if not has_begun:
        peek_training(experiment)
    workers = experiment.finetune.max_workers
    with shown_ray_session(experiment, display, workers) as resources:
        run_requested_checks(experiment, resources, display, ("finetune",))
        spec = prepare_finetune(experiment, display, stage / "data", has_begun=has_begun)
        spec.check()
        _open_ensemble(experiment, stage, spec)
        begun = time.monotonic()
        with display.stage("ensemble"):
            seq_len = spec.prepared.seq_len
            runner = TrialRunner(
                experiment.tune, spec, resources, stage, display, seq_len, experiment.ray.logs
            )
            store = TrialStore(stage / "members")
            first = experiment.finetune.seed
            names = [f"s{first + number}" for number in range(seeds)]
            wanted: list[tuple[str, Values, int]] = [
                (name, {}, first + n) for n, name in enumerate(names)
            ]
            source = FixedTrials(store, wanted, retry=True)
            runner.run(source)
        check_members(source.trials)
        models = [stage / "members" / name / "model" for name in names]
        validation = TokenizedTexts.load(spec.data, spec.prepared.validation)
        how = Preprocessing(spec.prepared.seq_len, spec.prepared.head_tokens)
        texts = validation.shortened(how, Tokenizer.load(spec.tokenizer))
        result = measure(models, texts, spec.config.metric)
    from raybert.inference.ensemble import write_ensemble

    write_ensemble(stage, [f"members/{name}/model" for name in names])
    result = dict(finite(result)) | {
        "model": stage.uri,
        "seconds": round(time.monotonic() - begun, 1),
    }
    stage.write_json(RESULT, result)
    display.print(f"ensemble  {_format_result(result)}, in {clock(result['seconds'])}; {stage}")
    return result


def check_members(members: Sequence[TrialRecord]) -> None:
    """Check that every member was trained; the same command trains one again that failed."""
    failed = [member for member in members if member.state != "finished"]
    if failed:
        names = ", ".join(member.name for member in failed)
        raise RaybertError(
            f"member {failed[0].name} failed: {failed[0].reason}; run the same command again to "
            f"resume {names} (the others are kept), or choose another run.name for other settings"
        )


def _open_ensemble(
    experiment: Experiment, stage: Folder, spec: FinetuneSpec | None = None
) -> dict[str, Any] | None:
    inputs = known_inputs(experiment) if spec is None else spec.inputs()
    may_change = dotted("finetune", ALIKE_MAY_CHANGE)
    result = open_run(
        stage, dump(experiment), "finetune", ("model",), inputs=inputs, may_change=may_change
    )
    check_same_texts(experiment.finetune, stage / "data")
    return result


def measure(
    models: list[Folder], texts: TokenizedTexts, metric: str | None = None
) -> dict[str, Any]:
    """Score each model and their ensemble; `mean` and `std` are of the members' metric."""
    from raybert.inference.classifier import TextClassifier

    classifiers = [TextClassifier(model) for model in models]
    tasks = [classifier.task for classifier in classifiers]
    outputs = [classifier.score(texts.input_ids) for classifier in classifiers]
    together: Outputs = [
        tasks[0].mean([np.asarray(each[row]) for each in outputs])
        for row in range(len(texts.input_ids))
    ]
    if not tasks[0].is_per_token:
        together = np.stack(list(together))
    members = [task.evaluate(x, texts.labels) for task, x in zip(tasks, outputs, strict=True)]
    ensemble = tasks[0].evaluate(together, texts.labels)
    metric = metric or tasks[0].default_metric
    values = [scores[metric] for scores in members]
    decided = [
        [frozenset(tasks[0].decision(np.asarray(row))) for row in each] for each in outputs
    ]  # [models, n]
    kept = [metric, *(key for key in _SCORES if key in ensemble and key != metric)]
    return {
        "metric": metric,
        "members": [{key: scores[key] for key in kept} for scores in members],
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "ensemble": {key: ensemble[key] for key in kept},
        "gain": (ensemble[metric] - statistics.fmean(values))
        * (1 if tasks[0].selection_metrics[metric] else -1),  # of an error, what it is lower by
        "agreement": float(np.mean([len(set(row)) == 1 for row in zip(*decided, strict=True)])),
        "n": ensemble["n"],
    }


def _format_result(result: dict[str, Any]) -> str:
    metric, gain = metric_of(result), result["gain"]
    return (
        f"{len(result['members'])} members {metric} {mean_and_deviation(result)}, together "
        f"{format_mean(result['ensemble'][metric])} "
        f"({'none' if gain is None else format(gain, '+.4f')}) "
        f"on {result['n']:,} validation texts"
    )
