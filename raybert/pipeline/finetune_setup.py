"""Prepare fine-tuning: initial model, tokenizer, texts and teachers.

Single runs, trials of a search and members of an ensemble share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from raybert.cluster.session import Resources, ray_session
from raybert.data.sources import documents
from raybert.data.sources.settings import SourceConfig
from raybert.data.tokenizer import CONFIG_FILE, TOKENIZER_FILE, Tokenizer
from raybert.errors import ConfigError, DataError, UserError
from raybert.experiment import Experiment
from raybert.pipeline.named_sources import require_source, with_sources
from raybert.pipeline.ray_stage import first_progress
from raybert.storage.folder import Folder
from raybert.storage.registry import resolve_model
from raybert.terminal.display import Display

if TYPE_CHECKING:
    from raybert.inference.ensemble import Teacher
    from raybert.tasks.finetune import FinetuneSpec
    from raybert.tasks.labelled import ResolvedSource
    from raybert.tasks.linear.teacher import LinearTeacher
    from raybert.tasks.prepared_texts import FitStudent, PreparedTexts, SplitTexts

#: Input length of texts that several runs share: each run truncates them to its own.
FULL_LENGTH = 1 << 20
#: In finetune.distill.teacher, the linear model on n-grams; a folder of this name is ./baseline.
BASELINE = "baseline"
_SHOWN_LABELS = 20
_SMALL_BYTES = 8 << 20  # of files, compressed or not


def prepare_finetune(
    experiment: Experiment,
    display: Display,
    data: Folder,
    *,
    has_begun: bool = False,
    full_length: bool = False,
    on_ray: bool = True,
    fold: tuple[int, int] | None = None,
    fit_baseline: Callable[[SplitTexts], dict[str, Any]] | None = None,
    fit_student: FitStudent | None = None,
) -> FinetuneSpec:
    """Tokenize the labelled texts, unless that is done, and return the run's specification.

    `has_begun`: runs use the texts in `data` already; `full_length`: texts keep their full length;
    `fold` (i, n): validate on the i-th of n parts; `fit_baseline` gets the texts before they are
    tokenized, `fit_student` what a teacher says of them.
    """
    from raybert.data.sources.documents import describe
    from raybert.jobs.doctor.run_checks import run_requested_checks
    from raybert.model import huggingface
    from raybert.tasks.finetune import FinetuneSpec
    from raybert.tasks.prepared_texts import prepare_texts, read_prepared_texts

    experiment = with_sources(experiment)
    config = experiment.finetune
    start, tokenizer = starting_point(experiment)
    if start is not None:
        huggingface.check_settings(
            start,
            config.head,
            compiles=config.compile,
            recomputes=config.activation_checkpointing,
        )
    if not all(tokenizer.exists(name) for name in (TOKENIZER_FILE, CONFIG_FILE)):
        Tokenizer.load(tokenizer).save(data)  # a vocab.txt, whose ids a model is to be saved with
        tokenizer = data
    prepared = read_prepared_texts(data) if has_begun else None
    if prepared is not None:
        check_same_teacher(experiment, data)
    else:
        if start is not None:
            huggingface.check_encoder(start)
        peek_training(experiment)
        seq_len = input_length(experiment, start, config.seq_len)
        teacher = None
        if config.distill.teacher is not None:
            teacher = make_teacher(
                experiment, lambda done: display.progress(f"teacher: {done:,} texts")
            )
        for line in describe(config.source, labels=True):
            display.print(f"texts     reads {line}")
        session: AbstractContextManager[Resources | None] = (
            ray_session(experiment.ray) if on_ray else nullcontext()
        )
        begins = first_progress() if on_ray else "reading labelled texts"
        with display.stage("texts", begins), session as resources:
            if resources is not None:
                run_requested_checks(experiment, resources, display, ("finetune",))
            display.progress("reading and tokenizing labelled texts")
            prepared = prepare_texts(
                config,
                Tokenizer.load(tokenizer),
                FULL_LENGTH if full_length else seq_len,
                config.seed,
                data,
                teach=None if teacher is None else teacher.logits,
                teacher="" if teacher is None else teacher.identity,
                fold=fold,
                fit_baseline=fit_baseline,
                fit_student=fit_student,
            )
        unknown = "" if prepared.unknown is None else f", {prepared.unknown:.2%} unknown tokens"
        display.print(
            f"texts     {prepared.train.rows:,} for training, {prepared.validation.rows:,} for "
            f"validation, of {', '.join(config.source.paths)}{unknown}{_format_cut(prepared)}"
            f"{format_skipped(prepared.skipped)}; labels {format_labels(prepared.labels)}"
        )
        display.print(f"task      {prepared.description}; finetune.task sets another one")
        for warning in prepared.warnings:
            display.print(f"warning   {warning}")
    return FinetuneSpec(config, experiment.model, start, tokenizer, data, prepared)


def known_inputs(experiment: Experiment) -> dict[str, str]:
    """The hashes of what a finished run has read, by name, as far as it is still there."""
    from raybert.tasks.finetune import hash_inputs

    try:
        return hash_inputs(*starting_point(experiment))
    except UserError:  # it was deleted after the run
        return {}


def make_teacher(
    experiment: Experiment, on_progress: Callable[[int], None] = lambda done: None
) -> Teacher | LinearTeacher:
    """The teacher that finetune.distill names; `on_progress` gets the number of scored texts."""
    from raybert.inference.ensemble import Teacher
    from raybert.tasks.linear.teacher import LinearTeacher

    if experiment.finetune.distill.teachers == [BASELINE]:
        return LinearTeacher(experiment.finetune.seed, on_progress)
    return Teacher(teachers(experiment), on_progress)


def check_same_teacher(experiment: Experiment, data: Folder) -> None:
    """Raise DataError if another teacher has scored the texts in `data`; one may be deleted."""
    from raybert.tasks.prepared_texts import read_prepared_texts

    distill = experiment.finetune.distill
    prepared = None if distill.teacher is None else read_prepared_texts(data)
    if prepared is None:
        return
    try:
        teacher = make_teacher(experiment)
    except UserError:
        return
    if prepared.made_from.get("teacher", "") not in ("", teacher.identity):
        raise DataError(
            f"{data} was prepared with another teacher than finetune.distill.teacher="
            f"{distill.teacher} is now; restore it, or choose another run.name"
        )


def format_labels(labels: Sequence[str]) -> str:
    """Format label names, of many only the first."""
    more = len(labels) - _SHOWN_LABELS
    shown = ", ".join(labels[:_SHOWN_LABELS])
    return f"{shown} and {more:,} more" if more > 0 else shown


def _format_cut(prepared: PreparedTexts) -> str:
    return f", {prepared.cut:,} cut to {prepared.seq_len:,} tokens" if prepared.cut else ""


def format_skipped(skipped: Mapping[str, int]) -> str:
    """Format the numbers of skipped rows, by reason, as the end of a line."""
    return "".join(f", {count:,} skipped ({reason})" for reason, count in skipped.items())


def starting_point(experiment: Experiment) -> tuple[Folder | None, Folder]:
    """The folders of the initial model (None: from scratch) and of the tokenizer; they exist."""
    path = experiment.finetune.initialize_from
    pretrained = experiment.folder / "pretrain" / "model"
    if path == "scratch":
        folder = experiment.folder / "corpus"
        if not folder.exists(TOKENIZER_FILE):
            raise UserError(
                f"{folder} has no tokenizer yet; build the corpus first: raybert corpus"
            )
        return None, folder
    if path == "pretrain":
        if not pretrained.exists("config.json"):
            raise UserError(
                f"{pretrained} does not exist yet; run `raybert pretrain` first, or set "
                "finetune.initialize_from to scratch or to a folder with a model"
            )
        return pretrained, pretrained
    folder = resolve_model(path, "pretrain", key="finetune.initialize_from")
    return folder, folder


def input_length(experiment: Experiment, start: Folder | None, seq_len: int | None) -> int:
    """The largest number of tokens of a text: `seq_len`, or the model's."""
    from raybert.model.huggingface import read_model_config

    longest = experiment.model.max_seq_len
    if start is not None:
        longest = read_model_config(start)[0].max_seq_len
    if seq_len is not None and seq_len > longest:
        raise UserError(
            f"finetune.seq_len={seq_len} exceeds the model's {longest} tokens; lower it, or "
            f"pretrain with model.max_seq_len={seq_len}"
        )
    return seq_len or longest


def teachers(experiment: Experiment) -> list[Folder]:
    """The folders of the teacher models; an ensemble stands for its members."""
    from raybert.inference.ensemble import members

    found: list[Folder] = []
    given = experiment.finetune.distill.teachers
    if given == [BASELINE]:  # it is fitted on the texts
        return []
    if BASELINE in given:
        raise ConfigError(
            f"finetune.distill.teacher={','.join(given)}: baseline teaches alone; leave it out, or "
            "the others"
        )
    for path in given:
        folder = Folder(path)
        ensemble = members(folder) or members(folder / "ensemble")
        found += ensemble or [resolve_model(path, key="finetune.distill.teacher")]
    return found


def peek_training(experiment: Experiment) -> ResolvedSource:
    """Read the first documents of the texts to train and validate on, before Ray starts.

    Raises:
        ConfigError: no texts are named.
        DataError: for mistakes that all rows share, as a missing column.
    """
    from raybert.data.sources.columns import REMEMBERED, with_columns_of
    from raybert.tasks.labelled import peek, resolve_source

    config = experiment.finetune
    require_source(config.source, "finetune.source")
    found = resolve_source(config.source, config.task)
    if config.validation is not None:
        columns = found.source.model_dump(include=set(REMEMBERED))
        peek(with_columns_of(config.validation, columns), found.task)
    for unlabelled in (config.distill.unlabelled, config.unlabelled):
        if unlabelled is not None:
            documents.shards(unlabelled)
    return found


def peek_evaluation(experiment: Experiment) -> None:
    """As `peek_training`, and the first document of the texts to evaluate on.

    Small sources are read as a whole, since what is wrong with a later row, or with all labels, is
    else found after hours of pretraining.
    """
    from raybert.data.sources.columns import REMEMBERED, with_columns_of
    from raybert.tasks.labelled import peek, read_labelled
    from raybert.tasks.prepared_texts import read_and_split

    require_source(experiment.evaluate.source, "evaluate.source")
    found, config = peek_training(experiment), experiment.finetune
    columns = found.source.model_dump(include=set(REMEMBERED))
    evaluation = with_columns_of(experiment.evaluate.source, columns)
    peek(evaluation, found.task)
    if all(map(_is_small, filter(None, [found.source, config.validation]))):
        labels = read_and_split(config, found, config.seed).task.labels
        if _is_small(evaluation):
            read_labelled(evaluation, found.task, labels)


def _is_small(source: SourceConfig) -> bool:
    """Whether reading all labelled texts of a source takes about a second."""
    shards = documents.shards(source, labels=True)
    return sum(file.size for shard in shards for file in shard.files) <= _SMALL_BYTES
