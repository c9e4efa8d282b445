"""Run all stages: `raybert run`, and `raybert demo` on the embedded movie reviews.

Sources and lengths are checked first, so that a mistake is found before hours of training.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from raybert.data.sources import documents
from raybert.errors import ConfigError, UserError
from raybert.experiment import Experiment
from raybert.pipeline import self_training_stage, stages
from raybert.pipeline.finetune_setup import peek_evaluation, starting_point, teachers
from raybert.pipeline.named_sources import require_source, with_sources
from raybert.pipeline.preflight import peek_corpus
from raybert.pipeline.ray_stage import shown_ray_session
from raybert.records import format_mean, selected
from raybert.storage.folder import Folder
from raybert.storage.registry import resolve_model
from raybert.tasks.registry import read_task
from raybert.terminal.display import Display
from raybert.terminal.formats import clock
from raybert.train.run_folder import CONFIG

MASK = "[MASK]"  # in every tokenizer that raybert trains


def run_stages(experiment: Experiment, display: Display) -> dict[str, Any]:
    """Run all stages that are not finished, and the report, in one Ray session."""
    from raybert.jobs.doctor.run_checks import run_requested_checks
    from raybert.report import check_report, write_report

    experiment = with_sources(experiment)
    check_sources(experiment)
    has_report = True
    try:
        check_report()
    except UserError as error:  # the run is possible without it
        has_report = False
        display.print(f"report    not written: {error}")
    begun, seconds, results = time.monotonic(), {}, {}
    workers = max(experiment.pretrain.max_workers, experiment.finetune.max_workers)
    with shown_ray_session(experiment, display, workers) as resources:
        run_requested_checks(experiment, resources, display, ("pretrain", "finetune"))
        for name, stage in (
            ("corpus", stages.make_corpus),
            ("pretrain", stages.pretrain),
            ("finetune", self_training_stage.finetune),
            ("evaluate", stages.evaluate),
        ):
            stage_begun = time.monotonic()
            results[name] = stage(experiment, display)
            seconds[name] = round(time.monotonic() - stage_begun, 1)
    if has_report:
        write_report(experiment.folder)
    seconds["all"] = round(time.monotonic() - begun, 1)
    pretrain, metrics = results["pretrain"], results["evaluate"]
    metric, value = selected(metrics)
    example: dict[str, Any] = next(iter(pretrain.get("fillings", [])), {})
    return {
        "seconds": seconds,
        "metric": metric,
        metric: value,
        "texts": metrics["n"],
        "masked_loss": pretrain["loss"],
        "unigram_loss": pretrain.get("unigram_loss"),
        "example": example.get("text"),
        "fill_mask": example.get("tokens", []),
        "run": experiment.folder.uri,
        "model": results["finetune"]["model"],
        "report": (experiment.folder / "report.html").uri if has_report else None,
    }


def format_run(experiment: Experiment, result: dict[str, Any]) -> str:
    """The end of a run: its score, where the report is, and what to do next."""
    metric, value = selected(result)
    lines = [
        f"{metric.capitalize()} on {result['texts']:,} texts  {format_mean(value)}",
        f"Took {clock(result['seconds']['all'])}.",
    ]
    if result["report"]:
        lines.append(f"Report: {result['report']}")
    return "\n".join([*lines, "Next:", *_next_commands(experiment, result)])


def _next_commands(experiment: Experiment, result: dict[str, Any]) -> list[str]:
    """Commands that use what a run has made."""
    raybert, folder = this_command(), shlex.quote(experiment.folder.uri)
    has_pairs = read_task(Folder(result["model"]))[1]
    text = '"a text" --pair "another text"' if has_pairs else '"a text"'
    return [
        f"  {raybert} predict -m {folder} {text}",
        f"  {raybert} serve {folder}   # answers over HTTP, and has a page",
        f"  {raybert} tune {shlex.join(sys.argv[2:])}   # searches for better settings",
    ]


def this_command() -> str:
    """How this command line was started."""
    path = Path(sys.argv[0])
    if path.name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m raybert"
    is_found = shutil.which(path.name) == str(path)
    return shlex.quote(path.name if is_found else str(path))


def check_sources(experiment: Experiment) -> None:
    """Raise a UserError if a source, a length, an example or a teacher can't be used."""
    _check_lengths(experiment)
    branch = experiment.pretrain.branch_from
    if branch is not None and not (experiment.folder / "pretrain").exists(CONFIG):
        from raybert.train.branch import find_branch

        find_branch(branch)
    require_source(experiment.corpus.source, "corpus.source")
    peek_corpus(experiment.corpus.source)
    if experiment.corpus.overlap is not None:
        documents.fingerprint(experiment.corpus.overlap)
    if not (experiment.folder / "finetune").exists(CONFIG):  # a begun run keeps its prepared texts
        peek_evaluation(experiment)
        teachers(experiment)
        _check_start(experiment)
        config = experiment.finetune
        for unlabelled in (config.distill.unlabelled, config.unlabelled):
            if unlabelled is not None:
                documents.fingerprint(unlabelled)
        self_training_stage.check_unlabelled(experiment)


def _check_start(experiment: Experiment) -> None:
    """Raise where the weights that fine-tuning starts from do not fit their configuration."""
    if experiment.finetune.initialize_from not in ("pretrain", "scratch"):
        from raybert.model.huggingface import check_encoder

        start, _ = starting_point(experiment)
        assert start is not None
        check_encoder(start)


def _check_lengths(experiment: Experiment) -> None:
    path, longest = experiment.pretrain.initialize_from, experiment.model.max_seq_len
    known, remedy = f"model.max_seq_len={longest}", "raise model.max_seq_len, or lower"
    if path is not None:
        from raybert.model.huggingface import check_encoder, read_own_config

        start = resolve_model(path, "pretrain", key="pretrain.initialize_from")
        longest = read_own_config(start)[0].max_seq_len
        check_encoder(start)
        known, remedy = f"the {longest} tokens that pretrain.initialize_from={path} reads", "lower"
    lengths = {"corpus.seq_len": experiment.corpus.seq_len}
    if experiment.finetune.initialize_from in ("pretrain", "scratch"):
        lengths["finetune.seq_len"] = experiment.finetune.seq_len or 0
    for key, seq_len in lengths.items():
        if seq_len > longest:
            raise ConfigError(f"{key}={seq_len} exceeds {known}; {remedy} {key}")
    for text in experiment.pretrain.examples or []:
        if experiment.corpus.tokenizer.kind != "file" and MASK not in text:
            raise ConfigError(
                f"pretrain.examples: {text!r} has no {MASK}; put it in place of a word"
            )


def run_demo(experiment: Experiment, display: Display, text: str) -> dict[str, Any]:
    """Run all stages on the embedded reviews, classify a sentence, and print a summary."""
    from raybert.pipeline.predict_stage import number_texts, predict_texts

    # Both budgets, and what start-up, corpus and evaluation take besides.
    minutes = (experiment.pretrain.minutes or 5) + (experiment.finetune.minutes or 5) + 2.5
    display.print(
        "Pretrains a BERT on 25,000 movie reviews and fine-tunes it into a classifier: about "
        f"{minutes:.0f} minutes on two cores. Everything is written to {experiment.folder}; after "
        "Ctrl-C the same command resumes."
    )
    result = run_stages(experiment, display)
    answer = next(iter(predict_texts(Folder(result["model"]), number_texts([text]))))
    result["answer"] = answer
    print(_format_summary(experiment, result), flush=True)
    return result


def _format_answer(answer: dict[str, Any]) -> str:
    """The columns of a prediction in a few words."""
    if "label" in answer:
        return f"{answer['label']} ({answer['score']:.3f})"
    shown = {key: value for key, value in answer.items() if key not in ("row", "text", "scores")}
    return json.dumps(shown, ensure_ascii=False)


def _format_summary(experiment: Experiment, result: dict[str, Any]) -> str:
    answer, folder = result["answer"], shlex.quote(experiment.folder.uri)
    loss, unigram = result["masked_loss"], result["unigram_loss"]
    metric, value = selected(result)
    gain = (
        f", {unigram - loss:.2f} below the unigram model's {unigram:.3f}"
        if unigram is not None and loss is not None
        else ""
    )
    guesses = [f"  {guess['probability']:.3f}  {guess['token']}" for guess in result["fill_mask"]]
    raybert = this_command()
    return "\n".join(
        [
            "",
            f"Held-out masked-token loss  {format_mean(loss, 3)} nats{gain}",
            f"{metric.capitalize()} on {result['texts']:,} test reviews  {format_mean(value)}",
            "",
            str(result["example"] or ""),
            *guesses,
            "",
            f"{answer['text']!r}  ->  {_format_answer(answer)}",
            "",
            f"Took {clock(result['seconds']['all'])}."
            + (f" Report: {result['report']}" if result["report"] else ""),
            "Next:",
            f'  {raybert} fill-mask -m {folder} "The acting was [MASK]."',
            f'  {raybert} predict -m {folder} "Boring from the first minute to the last."',
            f"  {raybert} config > mine.yaml   # then set corpus.source.path to your own text",
        ]
    )
