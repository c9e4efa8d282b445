"""`raybert init`: look at a file, write a short configuration for it, and say what to run next."""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raybert.cluster.machine import cores
from raybert.config import build
from raybert.data.sources import documents
from raybert.data.sources.settings import EvaluationSource, SourceConfig
from raybert.errors import DataError, UserError
from raybert.experiment import Experiment, RunConfig
from raybert.jobs.estimate import estimate, format_estimate, training_of
from raybert.pipeline.data_summary import Summary, summarize
from raybert.pipeline.run_stages import this_command
from raybert.storage.registry import REGISTRY
from raybert.yaml_values import parse_yaml, write_yaml

SCHEMA = "raybert.schema.json"  # beside the configuration, for editors
_LENGTHS = (32, 64, 128, 256, 512)  # tokens of a text that the model reads
_MINUTES, _TOKENS_PER_MINUTE = 5, 1_500_000  # of pretraining; read by two cores, about
_EPOCHS = 40  # of pretraining at most: of a small corpus, more of them teach little
_FEW_ROWS = 1000  # of which a larger share has to be held out
_SHOWN = 10  # labels

Line = tuple[int, str, Any, str]  # depth, key, value (None: a section), comment


def init(
    source: SourceConfig,
    output: Path | None,
    *,
    test: str | None = None,
    name: str | None = None,
    force: bool = False,
    wants_labels: bool = True,
) -> dict[str, Any]:
    """Write the configuration and the schema; return what was found, and lines about it."""
    plain = unicodedata.normalize("NFKD", Path(source.paths[0]).name.partition(".")[0])
    plain = "".join(char for char in plain if not unicodedata.combining(char))
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", plain)
    name = name or stem.strip("-._") or "mine"
    name = "mine" if name == REGISTRY else name
    build(RunConfig, {"name": name}, "--name")
    output = output or Path(f"{name}.yaml")
    if output.exists() and not force:
        raise UserError(f"{output} exists already; name another file with -o, or pass --force")
    summary = summarize(source, wants_labels=wants_labels)
    text = _to_yaml(_settings(summary, name, test), output)
    experiment = build(Experiment, parse_yaml(text, str(output)), str(output))
    _write(output, text)
    schema = output.with_name(SCHEMA)
    _write(schema, json.dumps(Experiment.model_json_schema(), indent=1) + "\n")
    commands = _commands(summary, experiment, output)
    lines = [
        *describe(summary),
        "",
        f"Wrote {output}, and {schema} for editors.",
        *_estimate(summary, experiment),
        "Next:",
        *(f"  {command}" for command in commands),
    ]
    found = {
        "config": str(output),
        "rows": summary.rows,
        "task": summary.task.name if summary.task else None,
        "text_column": summary.source.text_column,
        "label_column": summary.source.label_column if summary.task else None,
        "labels": summary.counts,
        "tokens": summary.tokens,
        "scripts": summary.scripts,
        "duplicates": summary.copies,
        "skipped": dict(summary.skipped),
        "warnings": summary.warnings,
        "next": commands,
    }
    return {**found, "lines": lines}


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from None


def describe(summary: Summary) -> list[str]:
    """What was found, in lines."""
    source = summary.source
    lines = [f"texts     {line}" for line in documents.describe(source, labels=bool(summary.task))]
    for column in summary.columns:
        role = ""
        if column.name == source.text_column:
            role = "  <- text"
        elif summary.task and column.name == source.label_column:
            role = "  <- label"
        lines.append(
            f"column    {column.name}: {column.distinct:,} different values in the first "
            f"{column.filled:,}, as {column.example!r}{role}"
        )
    some = "" if summary.is_whole else "the first "
    lines.append(
        f"rows      {some}{summary.rows:,}; about {summary.tokens['median']:,} tokens a text, 95% "
        f"at most {summary.tokens['95%']:,}, the longest {summary.tokens['most']:,}"
    )
    lines += [f"skipped   {n:,} rows: {why}" for why, n in summary.skipped.most_common()]
    if summary.copies:
        more = f", {summary.conflicts:,} with several labels" if summary.conflicts else ""
        lines.append(f"copies    {summary.copies:,} texts occur again{more}")
    if summary.scripts:
        shown = ", ".join(f"{name} {share:.0%}" for name, share in summary.scripts.items())
        lines.append(f"scripts   {shown}")
    if summary.task is None:
        lines.append("labels    none found; --label-column names a column")
        return lines
    lines.append(f"task      {summary.reason}")
    if summary.counts:
        most = sorted(summary.counts.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {count:,}" for name, count in most[:_SHOWN])
        more = f" and {len(most) - _SHOWN:,} more" if len(most) > _SHOWN else ""
        lines.append(f"labels    {shown}{more}")
    if summary.other_labels:
        lines.append(f"          --label-column may also name {' or '.join(summary.other_labels)}")
    return lines + [f"warning   {warning}" for warning in summary.warnings]


def _settings(summary: Summary, name: str, test: str | None) -> Iterator[Line]:
    """The lines of the configuration: what differs from the defaults, and what users change."""
    source = summary.source
    yield 0, "run", None, ""
    yield 1, "name", name, f"everything is written to runs/{name}; the same name resumes"
    yield 0, "corpus", None, ""
    yield 1, "source", None, ""
    yield 2, "path", source.path, ""
    if source.text_column != "text":
        yield 2, "text_column", source.text_column, ""
    if summary.skipped:
        problems = ", ".join(f"{n:,} {why}" for why, n in summary.skipped.most_common(3))
        yield 2, "on_bad_row", "skip", problems
    if summary.task and test is None and not _has_test(source):
        share = 0.2 if summary.rows < _FEW_ROWS else 0.1
        yield 2, "hold_out", share, "share of the texts that only evaluation reads"
    longest = next((n for n in _LENGTHS if n >= summary.tokens["95%"]), _LENGTHS[-1])
    yield 1, "seq_len", longest, f"95% of the texts have at most {summary.tokens['95%']:,} tokens"
    yield 1, "tokenizer", None, ""
    yield 2, "vocab_size", 8192, "tokens at most"
    if summary.total_tokens * 0.01 < 10 * longest:
        yield 1, "heldout_fraction", 0.1, "share of the texts that measure pretraining"
    yield 0, "model", None, ""
    yield (
        1,
        "size",
        "tiny",
        "learns in minutes on a CPU; mini, small, base, large are slower, better",
    )
    yield 0, "pretrain", None, ""
    if summary.total_tokens * _EPOCHS < _MINUTES * _TOKENS_PER_MINUTE:
        yield 1, "epochs", _EPOCHS, "passes over the texts"
    else:
        yield 1, "minutes", _MINUTES, "more is better: hours for a corpus of gigabytes"
    workers = min(2, cores())
    yield 1, "workers", workers, "processes; as many as there are cores or GPUs"
    if summary.task is None:
        return
    yield 0, "finetune", None, ""
    if source.label_column != "label" or source.pair_column is not None:
        yield 1, "source", None, ""
        if source.label_column != "label":
            yield 2, "label_column", source.label_column, ""
        if source.pair_column is not None:
            yield 2, "pair_column", source.pair_column, ""
    yield 1, "task", summary.task.name, "what the labels look like"
    yield 1, "epochs", 5, "passes over the labelled texts; or minutes"
    yield 1, "workers", workers, ""
    if test is not None:
        yield 0, "evaluate", None, ""
        yield 1, "source", None, ""
        yield 2, "path", test, "texts that no other stage reads"


def _has_test(source: SourceConfig) -> bool:
    """Whether the source has a test split of its own."""
    try:
        splits = [
            {split for shard in documents.shards(given, labels=True) for split in shard.splits}
            for given in (source, EvaluationSource.model_validate(source.model_dump()))
        ]
    except DataError:
        return False
    return bool(splits[1]) and splits[0].isdisjoint(splits[1])


def _to_yaml(lines: Iterator[Line], output: Path) -> str:
    found = [
        f"# yaml-language-server: $schema={SCHEMA}",
        "# Every key and what it means: raybert config --commented",
    ]
    for depth, key, value, comment in lines:
        text = f"{key}:" if value is None else write_yaml({key: value}).rstrip("\n")
        first, *rest = (("  " * depth) + line for line in text.split("\n"))
        found += [f"{first:<26}  # {comment}" if comment else first, *rest]
    return "\n".join(found) + "\n"


def _estimate(summary: Summary, experiment: Experiment) -> list[str]:
    """The time of each stage that trains, in lines, from the number of tokens."""
    lines = []
    read = summary.total_tokens * (1 - experiment.corpus.source.hold_out)
    for stage in ("pretrain", "finetune") if summary.task else ("pretrain",):
        config = training_of(experiment, stage)
        if config.minutes is None:  # the texts are not prepared yet, so epochs have no steps
            tokens = max(1, round(read * (config.epochs or 1)))
            changed = config.model_copy(update={"tokens": tokens, "epochs": None})
            experiment = experiment.model_copy(update={stage: changed})
        found = estimate(experiment, stage, {"CPU": float(cores())}, reads=False)
        lines.append(f"{stage:<9} {format_estimate(found)[1]}")
    return lines


def _commands(summary: Summary, experiment: Experiment, output: Path) -> list[str]:
    raybert, config = this_command(), shlex.quote(str(output))
    folder = shlex.quote(f"{experiment.run.storage}/{experiment.run.name}")
    if summary.task is None:
        return [f"{raybert} corpus -c {config}", f"{raybert} pretrain -c {config}"]
    return [f"{raybert} run -c {config}", f"{raybert} serve {folder}"]
