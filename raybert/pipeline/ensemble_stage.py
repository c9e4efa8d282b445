"""`raybert finetune --seeds N`: one fine-tuning with several seeds, and what they are together.

`<storage>/<name>/ensemble/` holds `data/`, `members/` (runs like any other) and `ensemble.json`, by
which `--distill-from` finds them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from raybert.cluster.session import ray_session
from raybert.config import dump
from raybert.errors import RaybertError
from raybert.experiment import Experiment
from raybert.jobs.doctor.run_checks import run_requested_checks
from raybert.pipeline.finetune_setup import prepare_finetune
from raybert.pipeline.trial_runner import Runner
from raybert.storage.folder import Folder
from raybert.tasks.classification import FinetuneSpec
from raybert.tasks.classification_metrics import classification_scores
from raybert.tasks.texts import Texts
from raybert.terminal.display import Display, clock
from raybert.train.run import CONFIG, RESULT, dotted, open_run
from raybert.train.settings import ALIKE_MAY_CHANGE
from raybert.tune.samplers import FixedTrials
from raybert.tune.space import Values
from raybert.tune.trial_store import TrialRecord, TrialStore

_KEYS = ("accuracy", "loss", "f1_macro", "expected_calibration_error")


def finetune_seeds(experiment: Experiment, display: Display, seeds: int) -> dict[str, Any]:
    """Fine-tune with several seeds at once, and measure them alone and together.

    Returns:
        `members` (each one's scores), `mean` and `std` of their accuracies, `ensemble` (the scores
        of their mean probability on the validation texts), `gain` in accuracy over the mean, and
        `model`: the ensemble's folder.

    Raises:
        RaybertError: a member failed.
    """
    stage = experiment.folder / "ensemble"
    if stage.exists(RESULT):
        result = _open(experiment, stage)
        if result is not None and len(result["members"]) == seeds:
            display.say(f"ensemble  {stage} is finished already: {_line(result)}")
            return result
        stage.delete(RESULT)  # more members are wanted, or fewer
    has_begun = stage.exists(CONFIG)
    with ray_session(experiment.ray, experiment.finetune.max_workers) as resources:
        run_requested_checks(experiment, resources, display, ("finetune",))
        job = prepare_finetune(experiment, display, stage / "data", has_begun=has_begun)
        job.check()
        _open(experiment, stage, job)
        begun = time.monotonic()
        with display.stage("ensemble"):
            runner = Runner(experiment, display, job, resources)
            ledger = TrialStore(stage / "members")
            first = experiment.finetune.seed
            names = [f"s{first + number}" for number in range(seeds)]
            wanted: list[tuple[str, Values, int]] = [
                (name, {}, first + n) for n, name in enumerate(names)
            ]
            source = FixedTrials(ledger, wanted, retry=True)
            runner.run(stage, ledger, source, keys=[], limit=seeds, retries=True)
        check_members(source.entries)
        models = [stage / "members" / name / "model" for name in names]
        validation = Texts.load(job.data, job.prepared.validation)
        result = measure(models, validation, job.prepared.labels)
    from raybert.inference.ensemble import write_ensemble

    write_ensemble(stage, [f"members/{name}/model" for name in names])
    result |= {"model": stage.uri, "seconds": round(time.monotonic() - begun, 1)}
    stage.write_json(RESULT, result)
    display.say(f"ensemble  {_line(result)}, in {clock(result['seconds'])}; {stage}")
    return result


def check_members(entries: Sequence[TrialRecord]) -> None:
    """Refuse to measure an ensemble that lacks a member.

    Raises:
        RaybertError: a member failed; says that the same command tries it again.
    """
    failed = [entry for entry in entries if entry.state != "finished"]
    if failed:
        names = ", ".join(entry.name for entry in failed)
        raise RaybertError(
            f"member {failed[0].name} failed: {failed[0].why}; run the same command again to go on "
            f"with {names} (the others are kept), or choose another run.name for other settings"
        )


def _open(
    experiment: Experiment, stage: Folder, job: FinetuneSpec | None = None
) -> dict[str, Any] | None:
    return open_run(
        stage,
        dump(experiment),
        "finetune",
        ("model",),
        inputs=None if job is None else job.inputs(),
        may_change=dotted("finetune", ALIKE_MAY_CHANGE),
    )


def measure(models: list[Folder], texts: Texts, labels: list[str]) -> dict[str, Any]:
    """Score models alone and together on tokenized texts."""
    from raybert.inference.classifier import TextClassifier
    from raybert.inference.ensemble import mean_logits

    found = [TextClassifier(model).score(texts.input_ids) for model in models]
    alone = [classification_scores(logits, texts.labels, labels) for logits in found]
    together = classification_scores(mean_logits(found), texts.labels, labels)
    accuracies = [scores["accuracy"] for scores in alone]
    return {
        "members": [{key: scores[key] for key in _KEYS} for scores in alone],
        "mean": statistics.fmean(accuracies),
        "std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "ensemble": {key: together[key] for key in _KEYS},
        "gain": together["accuracy"] - statistics.fmean(accuracies),
        "agreement": float(np.mean([len({int(p) for p in row}) == 1 for row in _votes(found)])),
        "n": together["n"],
    }


def _votes(logits: list[Any]) -> Any:
    """Each text's predictions, [n, models]."""
    return np.stack([each.argmax(axis=1) for each in logits], axis=1)


def _line(result: dict[str, Any]) -> str:
    spread = "" if result["std"] is None else f" ± {result['std']:.4f}"
    together = result["ensemble"]["accuracy"]
    return (
        f"{len(result['members'])} members {result['mean']:.4f}{spread}, together {together:.4f} "
        f"({result['gain']:+.4f}) on {result['n']:,} validation texts"
    )
