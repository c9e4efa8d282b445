"""The headline numbers of a corpus, a training run or an evaluation."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raybert.records import measures, metric_of
from raybert.report.elements import Tile, format_metric, format_value, metric_name
from raybert.report.search import search_tiles
from raybert.report.stage_files import Stage, as_mapping, curve, last, number
from raybert.terminal.formats import format_count, format_duration

_MAX_MEASURES = 4  # tiles of an evaluation, beside that of its metric

HARDWARE_KEYS = ("environment", "machine", "versions", "hardware")  # of a result


def stage_tiles(stage: Stage) -> list[Tile]:
    """The headline numbers of a stage."""
    return [
        *_score_tiles(stage),
        *search_tiles(stage.search),
        *_training_tiles(stage),
        *_corpus_tiles(stage),
    ]


def corpus_facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says about the corpus, without its parts."""
    splits, info = as_mapping(manifest.get("splits")), as_mapping(manifest.get("info"))
    found = {key: v for key, v in manifest.items() if key not in ("splits", "info")}
    if splits:
        found["rows"] = {name: as_mapping(split).get("rows") for name, split in splits.items()}
    # `inputs` has sizes and times of files; the configuration has their names.
    hidden = ("config", "inputs", *HARDWARE_KEYS)
    return found | {key: value for key, value in info.items() if key not in hidden}


def _score_tiles(stage: Stage) -> Iterator[Tile]:
    scores, result = stage.scores, stage.result
    # The metric in a training run's result is that of its validation, which has its own tile.
    source = scores if scores or stage.records else result
    metric = metric_of(source)
    if (value := number(source.get(metric))) is not None:
        note = f"on {format_value(scores['n'])} held-out rows" if scores.get("n") else ""
        yield Tile(headline_label(stage), format_metric(metric, value), note)
    yield from _baseline_tile(stage)
    others = [name for name in measures(scores) if name not in (metric, "loss")]
    for name in others[:_MAX_MEASURES]:
        if (value := number(scores[name])) is not None:
            yield Tile(metric_name(name, begins=True), format_metric(name, value))


def _baseline_tile(stage: Stage) -> Iterator[Tile]:
    found = as_mapping(stage.scores.get("baseline"))
    metric, interval = str(found.get("metric", "")), found.get("interval")
    value = number(as_mapping(found.get("metrics")).get(metric))
    difference = number(found.get("difference"))
    if value is None or difference is None or not isinstance(interval, list):
        return
    low, high = interval
    note = f"a {found.get('description', 'linear model')}; the model is better by {difference:+.4f}"
    note += f" (95% interval {low:+.4f} to {high:+.4f})"
    yield Tile("Linear baseline", format_metric(metric, value), note)


def headline_label(stage: Stage) -> str:
    """The label of the tile with the stage's score."""
    return metric_name(metric_of(stage.scores or stage.result), begins=True)


def _training_tiles(stage: Stage) -> Iterator[Tile]:
    train, evals = stage.of_kind("train"), stage.of_kind("eval")
    if (loss := last(evals, "loss")) is not None:
        unigram = last(evals, "unigram_loss")
        if unigram is None:
            yield Tile("Validation loss", f"{loss:.3f}")
        else:
            side = "under" if loss <= unigram else "over"
            note = f"nats, {abs(unigram - loss):.2f} {side} the unigram model's"
            yield Tile("Masked-token loss", f"{loss:.3f}", note)
    if example := next((e for r in reversed(evals) for e in r.get("fillings") or []), None):
        if example.get("tokens"):
            token = str(example["tokens"][0].get("token", ""))
            yield Tile("First prediction", token, str(example.get("text", "")))
    metric = metric_of(evals[-1]) if evals else ""
    if known := [record for record in evals if number(record.get(metric)) is not None]:
        # Records of earlier versions may lack the score, and have a metric that is the better the
        # higher it is.
        best = max(known, key=lambda r: _first(number(r.get("score")), r[metric]))
        shown = format_metric(metric, best[metric])
        yield Tile(f"Validation {metric_name(metric)}", shown, "best evaluation")
    if speeds := curve(train, "tokens_per_second")[1]:
        mfu = last(train, "mfu")
        stepping = sum(curve(train, "step_seconds")[1])
        workers = last(stage.of_kind("event"), "workers") or 1
        notes = [
            "median",
            f"{mfu:.1%} of peak" if mfu else "",
            _format_wait(train, stepping, workers),
            _format_slowest(train, workers),
        ]
        median = f"{statistics.median(speeds):,.0f}"
        yield Tile("Tokens per second", median, ", ".join(filter(None, notes)))
    if (seconds := last(train, "seconds")) is not None:
        tokens = last(train, "tokens")
        note = f"{format_count(tokens)} tokens" if tokens else ""
        yield Tile("Training time", format_duration(seconds), note)


def _format_wait(train: Sequence[Mapping[str, Any]], stepping: float, workers: float) -> str:
    """The share of the steps that the rank that waits longest waits for data."""
    waits = curve(train, "data_wait_max")[1] or curve(train, "data_wait")[1]
    if not stepping:
        return ""
    rank = _most_often(train, "data_wait_rank") if workers > 1 and any(waits) else ""
    return f"{sum(waits) / stepping:.1%} waiting for data{rank}"


def _format_slowest(train: Sequence[Mapping[str, Any]], workers: float) -> str:
    """How much longer the slowest rank works than the mean of several."""
    mean = sum(curve(train, "own_seconds")[1])
    longest = sum(curve(train, "own_seconds_max")[1])
    if workers < 2 or not mean:
        return ""
    rank = _most_often(train, "own_seconds_rank")
    return f"the slowest of {workers:.0f} ranks takes {longest / mean:.2f}x the mean{rank}"


def _most_often(train: Sequence[Mapping[str, Any]], key: str) -> str:
    ranks = curve(train, key)[1]
    return f" (mostly rank {statistics.mode(ranks):.0f})" if ranks else ""


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _corpus_tiles(stage: Stage) -> Iterator[Tile]:
    found = corpus_facts(stage.manifest)
    for key in ("tokens", "rows", "documents", "vocab_size"):
        value = found.get(key)
        if isinstance(value, Mapping):  # by split
            value = sum(number(v) or 0 for v in value.values())
        if (total := number(value)) is not None:
            label = key.replace("vocab_size", "vocabulary").capitalize()
            yield Tile(label, format_count(total))
