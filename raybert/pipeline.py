"""The stages of an experiment, each of which knows where it reads and where it writes.

`<storage>/<name>/` holds `corpus/`, `pretrain/` and `finetune/`; the last two are run directories.
Every stage that is finished says so and does nothing, so a pipeline can be run again at any point.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

from raybert.config import dump
from raybert.display import Display, clock
from raybert.errors import UserError
from raybert.experiment import Experiment
from raybert.ray_session import ray_session
from raybert.storage import Folder
from raybert.text import corpus
from raybert.text.parts import Manifest
from raybert.text.tokenizer import TOKENIZER_FILE, Tokenizer

METRICS = "metrics.json"


def make_corpus(experiment: Experiment, display: Display, *, force: bool = False) -> dict[str, Any]:
    """Text -> tokenizer and corpus."""
    folder = experiment.folder / "corpus"
    made = None if force else corpus.existing(experiment.corpus, folder)
    if made is not None:
        display.say(f"corpus    {folder} is made already: {_corpus_line(made)}")
        return _corpus_result(folder, made)

    def show(progress: corpus.Progress) -> None:
        rate = progress.tokens / max(1e-9, progress.seconds)
        eta = ""
        if progress.total_documents and progress.documents:
            left = progress.total_documents / progress.documents - 1
            eta = f"  ETA {clock(left * progress.seconds)}"
        tokens = f"  {progress.tokens:,} tokens  {rate:,.0f} tokens/s{eta}"
        doing = "learning the vocabulary: " if progress.stage == "tokenizer" else ""
        display.line(f"{doing}{progress.documents:,} documents{tokens if progress.tokens else ''}")

    with display.stage("corpus"), ray_session(experiment.ray):
        made = corpus.build(experiment.corpus, folder, progress=show, force=force)
    display.say(f"corpus    {_corpus_line(made)}")
    return _corpus_result(folder, made)


def _corpus_line(manifest: Manifest) -> str:
    rows = manifest.splits["train"].rows
    info = manifest.info
    left_out = [
        f"{info[key]:,} {key}" for key in ("duplicates",) if isinstance(info.get(key), int)
    ] + [f"{count:,} skipped ({reason})" for reason, count in info.get("skipped", {}).items()]
    return (
        f"{rows:,} rows of {manifest.seq_len} tokens, vocabulary {manifest.vocab_size:,}, "
        f"{manifest.splits['heldout'].rows:,} rows held out"
        + (f", {', '.join(left_out)}" if left_out else "")
    )


def _corpus_result(folder: Folder, manifest: Manifest) -> dict[str, Any]:
    rows = {name: split.rows for name, split in manifest.splits.items()}
    info = {key: value for key, value in manifest.info.items() if key not in ("config", "inputs")}
    return {"corpus": folder.uri, "rows": rows, "vocab_size": manifest.vocab_size, **info}


def pretrain(experiment: Experiment, display: Display, *, bare: bool = False) -> dict[str, Any]:
    """Corpus -> a run with a pretrained `model/`."""
    from raybert.train.pretrain import PretrainJob

    folder = experiment.folder / "corpus"
    corpus.existing(experiment.corpus, folder)  # refuses a corpus that was made otherwise
    source = experiment.corpus.source.path
    job = PretrainJob(
        config=experiment.pretrain,
        model=experiment.model,
        corpus=folder,
        manifest=Manifest.read(folder),
        source=source if isinstance(source, str) else ", ".join(source),
    )
    return _train("pretrain", job, experiment, display, ("corpus", "model"), bare)


def finetune(experiment: Experiment, display: Display, *, bare: bool = False) -> dict[str, Any]:
    """Labelled texts and a pretrained model -> a run with a classifier in `model/`."""
    from raybert.train.finetune import FinetuneJob
    from raybert.train.run import CONFIG
    from raybert.train.texts import prepare_data, prepared_data

    config, run = experiment.finetune, experiment.folder / "finetune"
    start, tokenizer = _start(experiment)
    # A run that has begun keeps the texts that it began with.
    prepared = prepared_data(run / "data") if run.exists(CONFIG) else None
    if prepared is None:
        seq_len = min(config.seq_len or experiment.corpus.seq_len, _longest(experiment, start))
        if config.seq_len is not None and config.seq_len > seq_len:
            raise UserError(
                f"finetune.seq_len={config.seq_len} is past the model's {seq_len} tokens; lower "
                f"it, or pretrain with model.max_seq_len={config.seq_len}"
            )
        with display.stage("texts"), nullcontext() if bare else ray_session(experiment.ray):
            display.line("reading and tokenizing labelled texts")
            prepared = prepare_data(
                config, Tokenizer.load(tokenizer), seq_len, config.seed, run / "data"
            )
        skipped = "".join(f", {n:,} skipped ({why})" for why, n in prepared.skipped.items())
        display.say(
            f"texts     {prepared.train.rows:,} to train on, {prepared.validation.rows:,} to "
            f"choose by{skipped}; labels {', '.join(prepared.labels)}"
        )
    job = FinetuneJob(
        config=config,
        model=experiment.model,
        start=start,
        tokenizer=tokenizer,
        data=run / "data",
        prepared=prepared,
    )
    return _train("finetune", job, experiment, display, ("model",), bare)


def _start(experiment: Experiment) -> tuple[Folder | None, Folder]:
    """The model that fine-tuning starts from, and where the tokenizer lies."""
    where = experiment.finetune.initialize_from
    pretrained = experiment.folder / "pretrain" / "model"
    if where == "scratch":
        folder = experiment.folder / "corpus"
        if not folder.exists(TOKENIZER_FILE):
            raise UserError(f"{folder} has no tokenizer yet; make the corpus first: raybert corpus")
        return None, folder
    if where == "pretrain":
        if not pretrained.exists("config.json"):
            raise UserError(
                f"{pretrained} is not there yet; run `raybert pretrain` first, or set "
                "finetune.initialize_from to scratch or to a folder with a model"
            )
        return pretrained, pretrained
    folder = resolve_model(where)
    return folder, folder


def _longest(experiment: Experiment, start: Folder | None) -> int:
    """Tokens that the encoder reads."""
    if start is None:
        return experiment.model.max_seq_len
    return int(start.read_json("config.json").get("max_position_embeddings", 512))


def _train(
    stage: str,
    job: Any,
    experiment: Experiment,
    display: Display,
    sections: tuple[str, ...],
    bare: bool,
) -> dict[str, Any]:
    """Run a job to its end, or say that it is there already."""
    from raybert.train.run import execute_bare, open_run

    run = experiment.folder / stage
    job.check()
    finished = open_run(run, dump(experiment), stage, sections)
    if finished is not None:
        display.say(f"{stage:<9} {run} is finished already, at step {finished['step']:,}")
        return finished
    begun = time.monotonic()
    with display.stage(stage):
        if bare:
            result = execute_bare(job, run, on_progress=display.record)
        else:
            from raybert.train.worker import train_on_ray

            with ray_session(experiment.ray, job.config.workers) as resources:
                result = train_on_ray(job, run, resources, on_progress=display.record)
    display.say(
        f"{stage:<9} {result['step']:,} steps, {result['tokens']:,.0f} tokens in "
        f"{clock(time.monotonic() - begun)}; model in {result['model']}"
    )
    return result


def evaluate(experiment: Experiment, display: Display) -> dict[str, Any]:
    """The classifier on texts that nothing was chosen on -> `metrics.json` in its run."""
    run = experiment.folder / "finetune"
    if run.exists(METRICS):
        metrics = run.read_json(METRICS)
        if metrics.get("source") == experiment.evaluate.source.model_dump(mode="json"):
            display.say(f"evaluate  {run} is measured already: accuracy {metrics['accuracy']:.4f}")
            return dict(metrics)
    metrics = evaluate_model(experiment, run / "model", display)
    run.write_json(METRICS, metrics)
    return metrics


def evaluate_model(experiment: Experiment, model: Folder, display: Display) -> dict[str, Any]:
    """Measure any classifier on the experiment's evaluation source."""
    from raybert.model import hub
    from raybert.serve.evaluate import evaluate as measure

    source = experiment.evaluate.source
    names = hub.load_classifier(model)[1]
    with display.stage("evaluate"), ray_session(experiment.ray) as resources:
        metrics = measure(
            source,
            model,
            names,
            workers=max(1, int(resources.cpus) - 2),
            on_progress=lambda done: display.line(f"{done:,} texts"),
        )
    display.say(f"evaluate  accuracy {metrics['accuracy']:.4f} on {metrics['n']:,} texts")
    return {**metrics, "source": source.model_dump(mode="json"), "model": model.uri}


def resolve_model(path: str, stage: str = "finetune") -> Folder:
    """The model directory that a path means: itself, a run's `model/`, or an experiment's.

    Raises:
        UserError: there is none.
    """
    folder = Folder(path)
    for inside in ("", "model", f"{stage}/model"):
        candidate = folder / inside if inside else folder
        if candidate.exists("config.json"):
            return candidate
    raise UserError(f"{path}: no model here (config.json is missing); name a model/ or a run")
