"""The records of training, as in `metrics.jsonl`: their kinds, keys and events, with units.

The loop, the tasks and the checkpoint saver write them; the terminal, Prometheus, the search and
the report read them. Files of earlier versions may lack keys. A mean over nothing, as the loss of
rows without a predicted token, is NaN and never the best; in files NaN and infinity are null.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NotRequired, TypedDict

EventName = Literal[
    "start",  # of an attempt
    "budget",  # minutes became steps
    "stopped early",  # `patience` evaluations brought no better score
    "skipped step",  # its gradient was not finite
    "checkpoint failed",
    "checkpoint written",  # after one that failed
    "damaged checkpoint",
    "damaged log",  # lines of earlier attempts were left out
    "best checkpoint lost",
    "storage",  # it refuses, or works again
    "tracker",  # it has failed, or is too slow
    "preempted",  # a node will be taken away
    # The driver's own, shown where the run is followed and in no file:
    "restart",  # of the workers
    "resize",  # to another number of workers
    "profile",  # of some steps was written
    "waiting",  # for nodes
]


class _Record(TypedDict):
    step: int  # optimizer steps taken
    time: NotRequired[float]  # seconds since 1970, of writing
    total_steps: NotRequired[int | None]  # of the run; None: not known yet


class Rates(TypedDict):
    """The speed since the last record."""

    tokens_per_second: float  # of all workers together
    step_seconds: float  # seconds per step
    data_wait: float  # seconds per step that training waited for data


class RankTimes(TypedDict):
    """The ranks' own seconds a step, before they wait for each other; ranks count from 0."""

    data_wait_max: float  # of waiting for data, of the rank that waits longest
    data_wait_rank: int  # that rank
    own_seconds: float  # of waiting for data and of work, the mean of the ranks
    own_seconds_max: float  # the same of the slowest rank
    own_seconds_rank: int  # that rank


class TrainRecord(_Record, Rates):
    """The steps since the last record."""

    kind: Literal["train"]
    loss: float  # mean, nats
    lr: float  # the highest of the layers
    grad_norm: float  # of the last step, before clipping
    mfu: float | None  # model FLOPs utilization, 0 to 1; None: the device's peak is unknown
    epoch: float
    tokens: int  # since the start of the run
    seconds: float  # of training, over all attempts
    data_wait_max: NotRequired[float]  # these five as in RankTimes
    data_wait_rank: NotRequired[int]
    own_seconds: NotRequired[float]
    own_seconds_max: NotRequired[float]
    own_seconds_rank: NotRequired[int]


class Metrics(TypedDict):
    """What a task measures on held-out data."""

    score: float  # selects the best weights: higher is better
    loss: float  # nats
    unigram_loss: NotRequired[float]  # of a unigram model on the same rows, nats
    fillings: NotRequired[list[dict[str, Any]]]  # the examples' masks, predicted: text, tokens
    metric: NotRequired[str]  # the name of the one that selects; tasks add others beside it
    accuracy: NotRequired[float]
    f1_macro: NotRequired[float]
    temperature: NotRequired[float]  # divisor of the logits that calibrates them


def longest_data_wait(record: Mapping[str, Any]) -> tuple[float, int]:
    """Seconds a step that the rank that waits longest waits for data, and that rank."""
    return record.get("data_wait_max", record["data_wait"]), record.get("data_wait_rank", 0)


def metric_of(metrics: Mapping[str, Any]) -> str:
    """The name of the metric of a task; files of before there were tasks have the accuracy."""
    return str(metrics.get("metric") or "accuracy")


def selected(metrics: Mapping[str, Any]) -> tuple[str, float]:
    """The name and value of the metric of a task; NaN where there was nothing to measure."""
    name = metric_of(metrics)
    value = metrics[name]
    return name, math.nan if value is None else float(value)


def measures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What a task measured, by name: its metric, the loss, then the others; no counts, no speed.

    Without what there was nothing to measure of.
    """
    first = [name for name in (metric_of(metrics), "loss") if name in metrics]
    names = dict.fromkeys([*first, *metrics])
    found = {name: metrics[name] for name in names if name not in _NOT_MEASURED}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, float) and math.isfinite(value)
    }


def headline(metrics: Mapping[str, Any]) -> str:
    """That metric in words, as `accuracy 0.8440`."""
    name, value = selected(metrics)
    return f"{name} {format_mean(value)}"


def format_mean(value: float | None, digits: int = 4) -> str:
    """A mean with its digits; none where it is one over nothing."""
    return "none" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def format_behaviour(found: Mapping[str, Any], metric: str) -> str:
    """The pass rates in words, for the terminal and a model card."""
    rates = ", ".join(f"{test['name']} {test['passed']:.0%}" for test in found["tests"])
    cut = ", ".join(f"{row['share']:.0%} {row['score']:.4f}" for row in found["truncated"])
    cut = f"; {metric} of the first part of each text: {cut}" if cut else ""
    return f"{rates or 'no test fits the texts'}{cut}"


_NOT_MEASURED = ("score", "texts_per_second")  # by a task


class EvalRecord(_Record, Metrics):
    """An evaluation."""

    kind: Literal["eval"]
    epoch: float
    seconds: float  # of training, over all attempts


class CheckpointRecord(_Record):
    """A committed checkpoint."""

    kind: Literal["checkpoint"]
    stalled: float  # seconds that training stood still
    written: float  # seconds in the background
    bytes: int


class EventRecord(_Record):
    """Anything else that the user should know of."""

    kind: Literal["event"]
    event: EventName
    message: NotRequired[str]
    attempt: NotRequired[int]  # these three: of `start`
    workers: NotRequired[int]
    weights: NotRequired[str]  # SHA-256 of those that the attempt resumed from


Record = TrainRecord | EvalRecord | CheckpointRecord | EventRecord
OnRecord = Callable[[Record], None]


def ignore_record(record: Record) -> None:
    """Do nothing: the default of `OnRecord`."""


def finite(value: Any) -> Any:
    """Replace NaN and infinity by None in a JSON value."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value
