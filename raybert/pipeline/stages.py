"""The stages of an experiment: corpus, pretraining, fine-tuning, evaluation.

`<storage>/<name>/` holds `corpus/` and the run directories `pretrain/` and `finetune/`. A finished
stage returns its stored result, so the pipeline can be run again after an interruption anywhere.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from raybert.cluster.session import ray_session
from raybert.config import build, dump
from raybert.data.corpus import build as corpus
from raybert.data.corpus.manifest import MANIFEST, Manifest
from raybert.data.corpus.verification import verify_parts
from raybert.data.sources import documents
from raybert.data.sources.columns import with_columns_of
from raybert.data.sources.holding_out import divides
from raybert.data.sources.settings import SourceConfig
from raybert.errors import DamagedError, UserError, damaged_file
from raybert.experiment import EvaluateConfig, Experiment
from raybert.model import huggingface
from raybert.pipeline import baseline_stage
from raybert.pipeline.card_stage import complete_card
from raybert.pipeline.finetune_setup import (
    check_same_teacher,
    format_skipped,
    known_inputs,
    prepare_finetune,
)
from raybert.pipeline.named_sources import require_source, with_sources
from raybert.pipeline.ngrams_stage import add_ngrams
from raybert.pipeline.preflight import peek_corpus
from raybert.pipeline.ray_stage import first_progress
from raybert.records import finite, format_behaviour, headline
from raybert.storage.folder import Folder
from raybert.storage.registry import resolve_model
from raybert.tasks.labelled import peek
from raybert.tasks.prepared_texts import check_same_texts
from raybert.tasks.registry import read_columns, read_task
from raybert.terminal.display import Display
from raybert.terminal.formats import clock
from raybert.train.run_folder import (
    CONFIG,
    RESULT,
    open_run,
    order_micro_batch_size,
    read_config,
)

METRICS = "metrics.json"


def make_corpus(experiment: Experiment, display: Display, *, force: bool = False) -> dict[str, Any]:
    """Build the tokenizer and the corpus from raw text."""
    experiment = with_sources(experiment)
    require_source(experiment.corpus.source, "corpus.source")
    folder = experiment.folder / "corpus"
    manifest = None if force else corpus.existing(experiment.corpus, folder)
    if manifest is not None:
        display.print(f"corpus    {folder} is built already: {_format_corpus(manifest)}")
        return _corpus_result(experiment, display, manifest)

    def show(progress: corpus.Progress) -> None:
        rate = progress.tokens / max(1e-9, progress.seconds)
        eta = ""
        if progress.total_documents and progress.documents:
            left = progress.total_documents / progress.documents - 1
            eta = f"  ETA {clock(left * progress.seconds)}"
        tokens = f"  {progress.tokens:,} tokens  {rate:,.0f} tokens/s{eta}"
        prefix = "learning the vocabulary: " if progress.stage == "tokenizer" else ""
        tokens = tokens if progress.tokens else ""
        display.progress(f"{prefix}{progress.documents:,} documents{tokens}")

    peek_corpus(experiment.corpus.source)
    for line in documents.describe(experiment.corpus.source):
        display.print(f"corpus    reads {line}")
    with display.stage("corpus", first_progress()), ray_session(experiment.ray):
        display.progress("reading the texts")
        manifest = corpus.build(experiment.corpus, folder, progress=show, force=force)
    display.print(f"corpus    {_format_corpus(manifest)}")
    return _corpus_result(experiment, display, manifest)


def _format_corpus(manifest: Manifest) -> str:
    rows, info = {name: split.rows for name, split in manifest.splits.items()}, manifest.info
    removed = {"duplicates": "duplicates", "overlap": "also in the test set"}
    counts = [
        f", {info[k]:,} {name}" for k, name in removed.items() if isinstance(info.get(k), int)
    ]
    unknown = "" if info.get("unknown") is None else f", {info['unknown']:.2%} unknown tokens"
    source = f", from {', '.join(manifest.source.paths)}" if manifest.source else ""
    kind = f" ({info['tokenizer_kind']})" if "tokenizer_kind" in info else ""
    return (
        f"{rows['train']:,} rows of {manifest.seq_len} tokens, vocabulary {manifest.vocab_size:,}"
        f"{kind}{unknown}, {rows['heldout']:,} rows held out{''.join(counts)}{source}"
        f"{format_skipped(info.get('skipped', {}))}"
    )


def _corpus_result(experiment: Experiment, display: Display, manifest: Manifest) -> dict[str, Any]:
    """What the command prints; first a warning of unknown tokens, if there are many."""
    warning = corpus.warn_of_unknown(experiment.corpus, manifest.info.get("unknown"))
    if warning is not None:
        display.print(f"corpus    {warning}")
    rows = {name: split.rows for name, split in manifest.splits.items()}
    info = {key: value for key, value in manifest.info.items() if key not in ("config", "inputs")}
    folder = experiment.folder / "corpus"
    return {"corpus": folder.uri, "rows": rows, "vocab_size": manifest.vocab_size, **info}


def pretrain(
    experiment: Experiment, display: Display, *, in_process: bool = False
) -> dict[str, Any]:
    """Pretrain on the corpus; the run directory then holds `model/`."""
    from raybert.tasks.masked_lm import PretrainSpec

    sections, folder = ("corpus", "model"), experiment.folder / "corpus"
    experiment = with_sources(experiment)
    manifest = Manifest.read(folder) if folder.exists(MANIFEST) else None
    inputs = {} if manifest is None else {"corpus": manifest.digest}
    result = _stored_result("pretrain", experiment, display, sections, inputs)
    if result is not None:
        warn_above_unigram(result, display)
        return result
    manifest = manifest or Manifest.read(folder)  # which raises
    # Only settings are compared: the text may have been deleted since.
    corpus.check_config(experiment.corpus, manifest, folder)
    model, start, path = experiment.model, None, experiment.pretrain.initialize_from
    if path is not None:
        start = resolve_model(path, "pretrain", key="pretrain.initialize_from")
        huggingface.check_encoder(start)
        own = huggingface.read_own_config(start)[0]
        if not huggingface.has_masked_lm_head(start):
            display.print(f"pretrain  {start} predicts no masked tokens: its head begins random")
        model = own.model_copy(update={"dropout": model.dropout})
    source = ", ".join(experiment.corpus.source.paths)
    spec = PretrainSpec(experiment.pretrain, model, folder, manifest, source, start)
    spec.check()
    with display.stage("pretrain"):
        verify_parts(
            folder,
            manifest,
            lambda done, of: display.progress(f"verified {done:,} of {of:,} parts of the corpus"),
        )
    branch = experiment.pretrain.branch_from
    if branch is not None:
        from raybert.train.branch import begin_with

        inputs = {"corpus": manifest.digest}
        begin_with(experiment.folder / "pretrain", branch, dump(experiment), sections, inputs)
    result = train("pretrain", spec, experiment, display, sections, in_process)
    warn_above_unigram(result, display)
    return result


def warn_above_unigram(result: dict[str, Any], display: Display) -> None:
    """Warn of a masked language model that predicts no better than token frequencies do."""
    loss, unigram = result.get("loss"), result.get("unigram_loss")
    if loss is None:
        display.print(
            "warning   no held-out token was predicted, so the model was not measured: raise "
            "corpus.heldout_fraction, or give more text"
        )
    elif unigram is not None and loss >= unigram:
        display.print(
            f"warning   the held-out loss {loss:.3f} is not below the unigram model's "
            f"{unigram:.3f}: the model has learned no more than how frequent tokens are; train "
            "longer (pretrain.steps, pretrain.minutes), or lower pretrain.lr"
        )


def finetune(
    experiment: Experiment, display: Display, *, in_process: bool = False
) -> dict[str, Any]:
    """Fine-tune a model on labelled texts; the run directory then holds `model/`."""
    experiment, run = with_sources(experiment), experiment.folder / "finetune"
    inputs = known_inputs(experiment) if run.exists(RESULT) else {}
    result = _stored_result("finetune", experiment, display, ("model",), inputs)
    if result is None:
        spec = prepare_finetune(
            experiment,
            display,
            run / "data",
            has_begun=run.exists(CONFIG),
            on_ray=not in_process,
            fit_baseline=baseline_stage.fitter(experiment, display),
        )
        result = train("finetune", spec, experiment, display, ("model",), in_process)
        complete_card(experiment, run, display)
    if add_ngrams(experiment, display, run, baseline_stage.folder_of(experiment)):
        run.delete(METRICS)  # of the encoder alone
        complete_card(experiment, run, display)
    return result


def _stored_result(
    stage: str,
    experiment: Experiment,
    display: Display,
    sections: tuple[str, ...],
    inputs: dict[str, str],
) -> dict[str, Any] | None:
    """The result of a finished run; raises as `open_run` where it had other settings or inputs."""
    run = experiment.folder / stage
    if not run.exists(RESULT):
        return None
    result = open_run(run, dump(experiment), stage, sections, inputs=inputs)
    check_same_texts(experiment.finetune, run / "data")  # of a stage that has some
    check_same_teacher(experiment, run / "data")
    if result is not None:
        with damaged_file(run.join(RESULT)):
            result = {**result, "step": int(result["step"]), "model": str(result["model"])}
        display.print(f"{stage:<9} {run} is finished already, at step {result['step']:,}")
    return result


def train(
    stage: str,
    spec: Any,
    experiment: Experiment,
    display: Display,
    sections: tuple[str, ...],
    in_process: bool,
    run: Folder | None = None,
    title: str = "",
) -> dict[str, Any]:
    """Train what a stage's specification describes; returns the result.

    `run` is the run's folder and `title` its name on the terminal; by default both are the stage's.
    """
    from raybert.train.run import train_in_process

    run, title = run or experiment.folder / stage, title or stage
    spec.check()
    open_run(
        run,
        dump(experiment),
        stage,
        sections,
        inputs=spec.inputs(),
        log=lambda text: display.print(f"{title:<9} {text}"),
    )
    spec.check_sources()
    spec = replace(spec, order_micro_batch_size=order_micro_batch_size(run))
    begun = time.monotonic()
    with display.stage(title, "building the model" if in_process else first_progress()):
        if in_process:
            result = train_in_process(spec, run, on_progress=display.record)
        else:
            from raybert.jobs.doctor.run_checks import run_requested_checks
            from raybert.train.ray.driver import train_on_ray

            with ray_session(experiment.ray, spec.config.max_workers) as resources:
                run_requested_checks(experiment, resources, display, (stage,))
                count = spec.config.max_workers
                display.progress(
                    f"starting {count} worker{'s' if count > 1 else ''}, which import PyTorch, "
                    "connect and read the first batch"
                )
                result = train_on_ray(spec, run, resources, on_progress=display.record)
    display.print(
        f"{title:<9} {result['step']:,} steps, {result['tokens']:,.0f} tokens in "
        f"{clock(time.monotonic() - begun)}; model in {result['model']}"
    )
    return result


def evaluate(experiment: Experiment, display: Display) -> dict[str, Any]:
    """Evaluate the classifier on the test texts; writes `metrics.json` into its run."""
    experiment, run = with_sources(experiment), experiment.folder / "finetune"
    require_source(experiment.evaluate.source, "evaluate.source")
    stored = stored_metrics(experiment, run)
    if stored is not None:
        display.print(f"evaluate  {run} is evaluated already: {headline(stored)}")
        return stored
    shared = _find_training_file(run, experiment.evaluate.source)
    if shared is not None:
        display.print(
            f"evaluate  {shared} was used for training: the scores do not measure new texts; name "
            "other texts with --set evaluate.source.path=FILE"
        )
    metrics = evaluate_model(
        experiment,
        run / "model",
        display,
        baseline=baseline_stage.folder_of(experiment),
        keep=run,
    )
    metrics["seen_in_training"] = shared is not None
    run.write_json(METRICS, finite(metrics))
    complete_card(experiment, run, display, metrics)
    return metrics


def stored_metrics(experiment: Experiment, run: Folder) -> dict[str, Any] | None:
    """Return a run's stored metrics; None where its model or the evaluation source has changed."""
    from raybert.model.huggingface import weights_hash

    if not (run.exists(METRICS) and run.exists("model/config.json")):
        return None
    try:
        metrics = run.read_json(METRICS)
    except DamagedError:  # it is written again
        return None
    inputs = _evaluation_inputs(experiment, weights_hash(run / "model"))
    is_current = isinstance(metrics, dict) and metrics.get("made_from") == inputs
    return metrics if is_current else None


def evaluate_model(
    experiment: Experiment,
    model: Folder,
    display: Display,
    baseline: Folder | None = None,
    keep: Folder | None = None,
) -> dict[str, Any]:
    """Evaluate any classifier on the experiment's evaluation source, beside a linear model.

    The outputs of the texts are stored in the folder `keep`, for `raybert compare`.
    """
    from raybert.inference import bulk

    experiment = with_sources(experiment)
    require_source(experiment.evaluate.source, "evaluate.source")
    source = with_columns_of(experiment.evaluate.source, read_columns(model))
    # Missing or damaged weights are an error before Ray starts.
    inputs = _evaluation_inputs(experiment, huggingface.check_weights(model))
    task, _ = read_task(model)
    peek(source.model_copy(update={"labels": task.labels}), type(task))
    for line in documents.describe(source, labels=True):
        display.print(f"evaluate  reads {line}")
    with display.stage("evaluate", first_progress()), ray_session(experiment.ray) as resources:
        display.progress("starting workers, which import PyTorch and load the model")
        metrics = bulk.evaluate(
            source,
            model,
            workers=max(1, int(resources.cpus) - 2),
            on_progress=lambda done: display.progress(f"{done:,} texts"),
            baseline=baseline,
            keep=keep,
            behaviour_texts=experiment.evaluate.behaviour_texts,
        )
    display.print(
        f"evaluate  {headline(metrics)} on {metrics['n']:,} texts of {', '.join(source.paths)}"
        + _format_long(metrics["long_texts"], source)
        + format_skipped(metrics["skipped"])
    )
    if "baseline" in metrics:
        display.print(f"baseline  {baseline_stage.format_comparison(metrics)}")
    if "behaviour" in metrics:
        told = format_behaviour(metrics["behaviour"], metrics["metric"])
        display.print(f"behaviour {told}")
    return {
        **metrics,
        "source": source.model_dump(mode="json"),
        "model": model.uri,
        "made_from": inputs,
    }


def _format_long(count: int, source: SourceConfig) -> str:
    """How texts that are longer than the model's input were read."""
    how = "read in windows" if source.pair_column is None else "cut"
    return f", {count:,} longer than the model's input ({how})" if count else ""


def _evaluation_inputs(experiment: Experiment, weights_hash: str) -> dict[str, Any]:
    """Return everything that the metrics depend on: the source, its files, the weights."""
    source, count = experiment.evaluate.source, experiment.evaluate.behaviour_texts
    usual = count == EvaluateConfig().behaviour_texts
    return {
        **({} if usual else {"behaviour_texts": count}),
        "source": source.identity(),
        "files": documents.fingerprint(source, labels=True),
        "weights": weights_hash,
    }


def _find_training_file(run: Folder, source: SourceConfig) -> str | None:
    """Return a file that a run was trained on and that the source reads; None if there is none."""
    values = read_config(run) if run.exists(CONFIG) else {}
    try:
        with damaged_file(run.join(CONFIG)):
            given = values.get("finetune", {}).get("source", {})
        config = build(SourceConfig, given, CONFIG)
    except UserError:
        return None
    return find_shared_file(config, source)


def find_shared_file(training: SourceConfig, source: SourceConfig) -> str | None:
    """Return a file whose splits overlap in both sources; None if there is none."""
    if divides(training, source):
        return None
    try:
        shards = documents.shards(training, labels=True)
    except UserError:
        return None  # the texts were deleted
    read = {file.uri: set(shard.splits) for shard in shards for file in shard.files}
    for shard in documents.shards(source, labels=True):
        for file in shard.files:
            splits = read.get(file.uri)
            if splits is not None and (not splits or splits & set(shard.splits)):
                return file.name
    return None
