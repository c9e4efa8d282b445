"""`finetune.unlabelled`: texts without labels that the fine-tuned model labels for its successors.

The model of `finetune/`, with its n-grams, is the first teacher. Each round trains a student on the
labelled texts and on the teacher's probabilities for all (arXiv 1503.02531), and a linear model on
the teacher's surest answers; both together are the next teacher. `self_training/<round>/` holds
them. The best on the validation texts becomes the model of `finetune/`, which the first one stays
if no student is better.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from raybert.errors import ConfigError
from raybert.experiment import Experiment
from raybert.pipeline import stages
from raybert.pipeline.baseline_stage import folder_of
from raybert.pipeline.finetune_setup import peek_training, prepare_finetune
from raybert.pipeline.named_sources import with_sources
from raybert.pipeline.ngrams_stage import add_ngrams, score_validation
from raybert.storage.folder import Folder
from raybert.tasks.prepared_texts import read_prepared_texts
from raybert.tasks.settings import DistillConfig
from raybert.terminal.display import Display
from raybert.train.run_folder import CONFIG, RESULT

if TYPE_CHECKING:
    from raybert.tasks.labelled import Labelled
    from raybert.tasks.prepared_texts import SplitTexts
    from raybert.tasks.protocol import F32

CHOSEN = "self_training.json"  # in the folder of the fine-tuning: which round's model it has


def finetune(
    experiment: Experiment, display: Display, *, in_process: bool = False
) -> dict[str, Any]:
    """Fine-tune on labelled texts, then on unlabelled ones, if there are any."""
    experiment = with_sources(experiment)
    check_unlabelled(experiment)
    result = stages.finetune(experiment, display, in_process=in_process)
    run = experiment.folder / "finetune"
    if experiment.finetune.unlabelled is None or run.exists(CHOSEN):
        return result
    stage = experiment.folder / "self_training"
    rounds = [stage / str(number) for number in range(experiment.finetune.rounds + 1)]
    if not (rounds[0] / "model").exists("config.json"):
        (run / "model").copy_to(rounds[0] / "model", last="config.json")
    for number in range(1, len(rounds)):
        teacher, student = rounds[number - 1] / "model", rounds[number]
        _train_student(experiment, display, teacher, student, number, in_process)
    _choose(experiment, display, rounds, run)
    return result


def check_unlabelled(experiment: Experiment) -> None:
    """Raise ConfigError for a task whose texts no teacher labels, before anything is trained."""
    if experiment.finetune.unlabelled is None:
        return
    run = experiment.folder / "finetune"
    prepared = read_prepared_texts(run / "data") if run.exists(CONFIG) else None
    if prepared is None:
        found = peek_training(experiment)
        has_pairs, task = found.source.pair_column is not None, found.task
    else:
        has_pairs, task = prepared.has_pairs, type(prepared.make_task())
    if task.is_per_token or has_pairs:
        what = "pairs of texts" if has_pairs else task.name
        raise ConfigError(f"finetune.unlabelled has no effect on {what}; leave it out")


def _train_student(
    experiment: Experiment,
    display: Display,
    teacher: Folder,
    student: Folder,
    number: int,
    in_process: bool,
) -> None:
    """Train the student of a round, with its own n-grams, unless that is done."""
    config = experiment.finetune
    distill = DistillConfig(
        teacher=teacher.uri,
        share=config.distill.share,
        temperature=config.distill.temperature,
        unlabelled=config.unlabelled,
    )
    update = {"unlabelled": None, "distill": distill}
    taught = experiment.model_copy(update={"finetune": config.model_copy(update=update)})
    title = f"round {number}"
    if not student.exists(RESULT):
        spec = prepare_finetune(
            taught,
            display,
            student / "data",
            has_begun=student.exists(CONFIG),
            on_ray=not in_process,
            fit_student=functools.partial(
                _fit_ngrams, taught, display, student / "baseline", number == config.rounds
            ),
        )
        stages.train(
            "finetune", spec, taught, display, ("model",), in_process, run=student, title=title
        )
    add_ngrams(taught, display, student, student / "baseline")


def _fit_ngrams(
    experiment: Experiment,
    display: Display,
    folder: Folder,
    is_last: bool,
    split: SplitTexts,
    texts: Labelled,
    outputs: F32,
) -> None:
    """Fit a student's linear model; of the last one, which teaches none, on all labelled texts."""
    from raybert.tasks.linear.pseudo_labels import fit_pseudo_labels
    from raybert.tasks.linear.store import save_baseline

    config = experiment.finetune
    display.progress("fitting linear models on n-grams of the unlabelled texts")
    found = fit_pseudo_labels(
        split.task,
        texts,
        outputs,
        split.validation,
        metric=config.metric,
        seed=config.seed,
        refit=is_last and config.validation is None,
    )
    save_baseline(found, folder)


def _choose(experiment: Experiment, display: Display, rounds: list[Folder], run: Folder) -> None:
    """Give the fine-tuning the model of the round that is best on the validation texts."""
    from raybert.tasks.linear.decision import deciding_metric

    baselines = [folder_of(experiment), *(round_ / "baseline" for round_ in rounds[1:])]
    scored = [
        score_validation(round_ / "model", run / "data", baseline)
        for round_, baseline in zip(rounds, baselines, strict=True)
    ]
    task = scored[0].task
    metric = deciding_metric(task, len(scored[0].targets))
    values = [float(m.task.validate(m.outputs, m.targets)[metric]) for m in scored]
    sign = 1 if task.selection_metrics[metric] else -1
    best = max(range(len(rounds)), key=lambda number: sign * values[number])
    if best:
        for name in ("ngrams.json", "ngrams.safetensors"):
            (run / "model").delete(name)
        (rounds[best] / "model").copy_to(run / "model", last="config.json")
        run.delete(stages.METRICS)
    shown = ", ".join(f"{value:.4f}" for value in values[1:])
    run.write_json(CHOSEN, {"round": best, "metric": metric, "values": values})
    display.print(
        f"unlabelled validation {metric} {values[0]:.4f} without unlabelled texts, {shown} after "
        f"each round: " + (f"round {best} is kept" if best else "left out")
    )
