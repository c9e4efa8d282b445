"""What every kind of fine-tuning needs before it starts: the model, the tokenizer, the texts.

One run, the trials of a search and the members of an ensemble begin alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from raybert.cluster.session import Resources, ray_session
from raybert.data.tokenizer import TOKENIZER_FILE, Tokenizer
from raybert.errors import UserError
from raybert.experiment import Experiment
from raybert.storage.folder import Folder
from raybert.storage.model_folders import resolve_model
from raybert.terminal.display import Display

if TYPE_CHECKING:
    from raybert.tasks.finetune import FinetuneSpec

#: Tokens of a text, where runs that share texts shorten them each in its own way.
WHOLE = 1 << 20


def prepare_finetune(
    experiment: Experiment,
    display: Display,
    data: Folder,
    *,
    has_begun: bool = False,
    whole: bool = False,
    on_ray: bool = True,
) -> FinetuneSpec:
    """Prepare the texts, or find them prepared, and describe the run.

    Args:
        experiment: the configuration.
        display: shows how far it is.
        data: the folder of the prepared texts.
        has_begun: whether runs have begun on what lies there: then it is kept as it is.
        whole: whether the texts are kept at their full length.
        on_ray: whether Ray may be used.

    Raises:
        UserError: there is no model to start from, or texts are longer than it reads.
        DataError: whatever is wrong with the texts or labels.
    """
    from raybert.inference.ensemble import Teacher
    from raybert.jobs.doctor.run_checks import run_requested_checks
    from raybert.tasks.finetune import FinetuneSpec
    from raybert.tasks.prepared_texts import prepare_texts, read_prepared_texts

    config = experiment.finetune
    start, tokenizer = starting_point(experiment)
    prepared = read_prepared_texts(data) if has_begun else None
    if prepared is None:
        seq_len = input_length(experiment, start, config.seq_len)
        teacher = None
        if config.distill.teacher is not None:
            models = teachers(experiment)
            teacher = Teacher(models, lambda done: display.line(f"the teacher has read {done:,}"))
        session: AbstractContextManager[Resources | None] = (
            ray_session(experiment.ray) if on_ray else nullcontext()
        )
        with display.stage("texts"), session as resources:
            if resources is not None:
                run_requested_checks(experiment, resources, display, ("finetune",))
            display.line("reading and tokenizing labelled texts")
            prepared = prepare_texts(
                config,
                Tokenizer.load(tokenizer),
                WHOLE if whole else seq_len,
                config.seed,
                data,
                teach=None if teacher is None else teacher.logits,
                teacher="" if teacher is None else teacher.identity,
            )
        display.say(
            f"texts     {prepared.train.rows:,} to train on, {prepared.validation.rows:,} to "
            f"choose by{format_skipped(prepared.skipped)}; labels {', '.join(prepared.labels)}"
        )
    return FinetuneSpec(
        config=config,
        model=experiment.model,
        start=start,
        tokenizer=tokenizer,
        data=data,
        prepared=prepared,
    )


def format_skipped(skipped: Mapping[str, int]) -> str:
    """The rows that were left out, as the end of a line."""
    return "".join(f", {count:,} skipped ({reason})" for reason, count in skipped.items())


def starting_point(experiment: Experiment) -> tuple[Folder | None, Folder]:
    """The model that fine-tuning starts from, and where the tokenizer lies.

    Raises:
        UserError: they are not there.
    """
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
    folder = resolve_model(where, "pretrain", key="finetune.initialize_from")
    return folder, folder


def input_length(experiment: Experiment, start: Folder | None, seq_len: int | None) -> int:
    """The tokens of a text at most: as configured, or the corpus's, and what the model reads.

    Raises:
        UserError: more is configured than the model reads.
    """
    longest = experiment.model.max_seq_len
    if start is not None:
        longest = int(start.read_json("config.json").get("max_position_embeddings", 512))
    if seq_len is not None and seq_len > longest:
        raise UserError(
            f"finetune.seq_len={seq_len} is past the model's {longest} tokens; lower it, or "
            f"pretrain with model.max_seq_len={seq_len}"
        )
    return min(seq_len or experiment.corpus.seq_len, longest)


def teachers(experiment: Experiment) -> list[Folder]:
    """The models that teach: those named, and the members of a named ensemble.

    Raises:
        UserError: there is no model.
    """
    from raybert.inference.ensemble import members

    found: list[Folder] = []
    for path in experiment.finetune.distill.teachers:
        folder = Folder(path)
        several = members(folder) or members(folder / "ensemble")
        found += several or [resolve_model(path, key="finetune.distill.teacher")]
    return found
