"""The stages of an experiment, each of which knows where it reads and where it writes.

`<storage>/<name>/` holds `corpus/`, `pretrain/` and `finetune/`; the last two are run directories.
Every stage that is finished says so and does nothing, so a pipeline can be run again at any point.
"""

from __future__ import annotations

import time
from typing import Any

from raybert.cluster.session import ray_session
from raybert.config import build, dump, parse_yaml
from raybert.data.corpus import build as corpus
from raybert.data.corpus import identity
from raybert.data.corpus.manifest import Manifest
from raybert.data.sources import documents
from raybert.data.sources.settings import SourceConfig
from raybert.errors import ConfigError, UserError
from raybert.experiment import Experiment
from raybert.pipeline.finetune_setup import format_skipped, prepare_finetune, teachers
from raybert.storage.folder import Folder
from raybert.storage.model_folders import resolve_model
from raybert.terminal.display import Display, clock

METRICS = "metrics.json"
MASK = "[MASK]"  # of every tokenizer that raybert makes


def make_corpus(experiment: Experiment, display: Display, *, force: bool = False) -> dict[str, Any]:
    """Text -> tokenizer and corpus."""
    folder = experiment.folder / "corpus"
    made = None if force else identity.existing(experiment.corpus, folder)
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
    counts = {"duplicates": "duplicates", "overlap": "also in the test set"}
    left_out = "".join(
        f", {info[key]:,} {name}" for key, name in counts.items() if isinstance(info.get(key), int)
    )
    return (
        f"{rows:,} rows of {manifest.seq_len} tokens, vocabulary {manifest.vocab_size:,}, "
        f"{manifest.splits['heldout'].rows:,} rows held out"
        + left_out
        + format_skipped(info.get("skipped", {}))
    )


def _corpus_result(folder: Folder, manifest: Manifest) -> dict[str, Any]:
    rows = {name: split.rows for name, split in manifest.splits.items()}
    info = {key: value for key, value in manifest.info.items() if key not in ("config", "inputs")}
    return {"corpus": folder.uri, "rows": rows, "vocab_size": manifest.vocab_size, **info}


def pretrain(experiment: Experiment, display: Display, *, bare: bool = False) -> dict[str, Any]:
    """Corpus -> a run with a pretrained `model/`."""
    from raybert.model import huggingface
    from raybert.tasks.masked_lm import PretrainSpec

    sections = ("corpus", "model")
    finished = _finished("pretrain", experiment, display, sections)
    if finished is not None:
        return finished
    folder = experiment.folder / "corpus"
    manifest = Manifest.read(folder)
    # The text itself is not looked at: it may be gone by now.
    identity.check_config(experiment.corpus, manifest, folder)
    model, start, where = experiment.model, None, experiment.pretrain.initialize_from
    if where is not None:
        start = resolve_model(where, "pretrain", key="pretrain.initialize_from")
        model = huggingface.read_model_config(start)[0].model_copy(
            update={"dropout": model.dropout}
        )
    job = PretrainSpec(
        config=experiment.pretrain,
        model=model,
        corpus=folder,
        manifest=manifest,
        source=", ".join(experiment.corpus.source.paths),
        start=start,
    )
    return _train("pretrain", job, experiment, display, sections, bare)


def finetune(experiment: Experiment, display: Display, *, bare: bool = False) -> dict[str, Any]:
    """Labelled texts and a pretrained model -> a run with a classifier in `model/`."""
    from raybert.train.run_folder import CONFIG

    finished = _finished("finetune", experiment, display, ("model",))
    if finished is not None:
        return finished
    run = experiment.folder / "finetune"
    job = prepare_finetune(
        experiment, display, run / "data", has_begun=run.exists(CONFIG), on_ray=not bare
    )
    return _train("finetune", job, experiment, display, ("model",), bare)


def _finished(
    stage: str, experiment: Experiment, display: Display, sections: tuple[str, ...]
) -> dict[str, Any] | None:
    """The result of a run that is finished, which needs nothing that it was made from."""
    from raybert.train.run_folder import RESULT, open_run

    run = experiment.folder / stage
    result = open_run(run, dump(experiment), stage, sections) if run.exists(RESULT) else None
    if result is not None:
        display.say(f"{stage:<9} {run} is finished already, at step {result['step']:,}")
    return result


def _train(
    stage: str,
    job: Any,
    experiment: Experiment,
    display: Display,
    sections: tuple[str, ...],
    bare: bool,
) -> dict[str, Any]:
    """Run a job to its end."""
    from raybert.train.run import execute_bare
    from raybert.train.run_folder import open_run

    run = experiment.folder / stage
    job.check()
    open_run(
        run,
        dump(experiment),
        stage,
        sections,
        inputs=job.inputs(),
        log=lambda text: display.say(f"{stage:<9} {text}"),
    )
    begun = time.monotonic()
    with display.stage(stage):
        if bare:
            result = execute_bare(job, run, on_progress=display.record)
        else:
            from raybert.jobs.doctor.run_checks import run_requested_checks
            from raybert.train.ray.driver import train_on_ray

            with ray_session(experiment.ray, job.config.max_workers) as resources:
                run_requested_checks(experiment, resources, display, (stage,))
                result = train_on_ray(job, run, resources, on_progress=display.record)
    display.say(
        f"{stage:<9} {result['step']:,} steps, {result['tokens']:,.0f} tokens in "
        f"{clock(time.monotonic() - begun)}; model in {result['model']}"
    )
    return result


def evaluate(experiment: Experiment, display: Display) -> dict[str, Any]:
    """The classifier on texts that nothing was chosen on -> `metrics.json` in its run."""
    run = experiment.folder / "finetune"
    known = measured(experiment, run)
    if known is not None:
        display.say(f"evaluate  {run} is measured already: accuracy {known['accuracy']:.4f}")
        return known
    seen = _trained_on(run, experiment.evaluate.source)
    if seen is not None:
        display.say(
            f"evaluate  {seen} was trained on: the scores say little about new texts; name others "
            "with --set evaluate.source.path=FILE"
        )
    metrics = evaluate_model(experiment, run / "model", display)
    metrics["seen_in_training"] = seen is not None
    run.write_json(METRICS, metrics)
    return metrics


def measured(experiment: Experiment, run: Folder) -> dict[str, Any] | None:
    """What is known of a run's model on the experiment's evaluation source, as it is now."""
    if not (run.exists(METRICS) and run.exists("model/config.json")):
        return None
    metrics = run.read_json(METRICS)
    is_it = metrics.get("made_from") == _measured_from(experiment, run / "model")
    return dict(metrics) if is_it else None


def evaluate_model(experiment: Experiment, model: Folder, display: Display) -> dict[str, Any]:
    """Measure any classifier on the experiment's evaluation source."""
    from raybert.inference.evaluation import evaluate as measure
    from raybert.model import huggingface

    source = experiment.evaluate.source
    made_from = _measured_from(experiment, model)
    names = huggingface.read_label_names(model)
    with display.stage("evaluate"), ray_session(experiment.ray) as resources:
        metrics = measure(
            source,
            model,
            names,
            workers=max(1, int(resources.cpus) - 2),
            on_progress=lambda done: display.line(f"{done:,} texts"),
        )
    display.say(
        f"evaluate  accuracy {metrics['accuracy']:.4f} on {metrics['n']:,} texts"
        + format_skipped(metrics["skipped"])
    )
    return {
        **metrics,
        "source": source.model_dump(mode="json"),
        "model": model.uri,
        "made_from": made_from,
    }


def _measured_from(experiment: Experiment, model: Folder) -> dict[str, Any]:
    """All that decides what an evaluation finds: the source, its files, the weights."""
    from raybert.model.huggingface import weights_hash

    source = experiment.evaluate.source
    return {
        "source": source.model_dump(mode="json"),
        "files": documents.fingerprint(source, labels=True),
        "weights": weights_hash(model),
    }


def _trained_on(run: Folder, source: SourceConfig) -> str | None:
    """A file of which both a run's training and this source read the same part, if there is one."""
    from raybert.train.run_folder import CONFIG

    values = parse_yaml(run.read_text(CONFIG), run.join(CONFIG)) if run.exists(CONFIG) else {}
    try:
        config = build(SourceConfig, values.get("finetune", {}).get("source", {}), CONFIG)
    except UserError:
        return None
    return shared_file(config, source)


def shared_file(training: SourceConfig, source: SourceConfig) -> str | None:
    """A file of which both read the same part, if there is one."""
    try:
        shards = documents.shards(training, labels=True)
    except UserError:
        return None  # the texts are gone
    read = {file.uri: set(shard.splits) for shard in shards for file in shard.files}
    for shard in documents.shards(source, labels=True):
        for file in shard.files:
            splits = read.get(file.uri)
            if splits is not None and (not splits or splits & set(shard.splits)):
                return file.name
    return None


def check_sources(experiment: Experiment) -> None:
    """Look at what later stages need, so that a typo ends the command before hours of training.

    Raises:
        ConfigError: lengths that don't fit each other, an example without a mask.
        DataError: a source has no such files, or its first row no such column or label.
        UserError: a `sample:` whose package is not installed, a teacher that is not there.
    """
    from raybert.train.run_folder import CONFIG

    _check_lengths(experiment)
    documents.fingerprint(experiment.corpus.source)
    if experiment.corpus.overlap is not None:
        documents.fingerprint(experiment.corpus.overlap)
    if not (experiment.folder / "finetune").exists(CONFIG):  # it keeps the texts it began with
        documents.peek(experiment.finetune.source)
        if experiment.finetune.validation is not None:
            documents.peek(experiment.finetune.validation)
        teachers(experiment)
        if experiment.finetune.distill.unlabelled is not None:
            documents.fingerprint(experiment.finetune.distill.unlabelled)
    documents.peek(experiment.evaluate.source)


def _check_lengths(experiment: Experiment) -> None:
    model = experiment.model.max_seq_len
    if experiment.corpus.seq_len > model and experiment.pretrain.initialize_from is None:
        raise ConfigError(
            f"corpus.seq_len={experiment.corpus.seq_len} is past model.max_seq_len={model}; raise "
            "that, or make shorter rows"
        )
    seq_len, start = experiment.finetune.seq_len, experiment.finetune.initialize_from
    own = experiment.pretrain.initialize_from is None and start in ("pretrain", "scratch")
    if seq_len is not None and own and seq_len > model:
        raise ConfigError(
            f"finetune.seq_len={seq_len} is past model.max_seq_len={model}; raise that, or lower it"
        )
    for text in experiment.pretrain.examples:
        if experiment.corpus.tokenizer.kind != "file" and MASK not in text:
            raise ConfigError(
                f"pretrain.examples: {text!r} has no {MASK}; put one where a word is to be "
                "predicted"
            )
