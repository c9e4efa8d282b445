"""Select a precision: by speed when a replica starts, by accuracy and speed in `bench serve`.

Another process's work can slow down one precision and not the next. So each is timed several times,
and longer where the times differ; a choice whose times differ all the same is not stable: the next
replicas that start measure again, a few times at most.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from raybert.cluster.file_lock import lock_file
from raybert.inference.classifier import Text, TextClassifier
from raybert.inference.precision import (
    available_precisions,
    default_precision,
    machine_type,
    read_choice,
    store_choice,
    suitable_precisions,
)
from raybert.storage.folder import Folder
from raybert.tasks.protocol import Outputs, Targets, TextTask

MAX_POINTS_LOST = 0.5  # of accuracy, for a faster precision
MAX_DIFFERENCE = 0.05  # from fp32's probabilities, where no labels give an accuracy
MIN_SPEEDUP = 1.05  # over each more exact precision
_LENGTHS = (16, 48, 96, 160, 240, 320, 400, 512)  # tokens of the benchmark's texts, in turn
_TEXTS = 24
_SECONDS = 1.0  # of measuring each precision, after its first pass
MAX_SPREAD = 0.25  # between the best and the median time of a stable measurement
_MAX_WINDOWS = 3  # of _SECONDS each, or passes over labelled texts, until one is stable
_MIN_PASSES = 2  # in a window
_MAX_TRIES = 3  # starts that measure until one is stable; then the choice stays
_PARTS = 8  # of labelled texts, which are timed by themselves


def select_precision(folder: Folder, device: str, preferred: str | None = None) -> str:
    """Return the precision of all replicas on machines of this type, measured if none is stored.

    Where the model's folder can't be written, replicas could measure different results: the default
    is used. `preferred`, of the version that this one replaces, is stored without a benchmark.
    """
    where = torch.device(device)
    choice = read_choice(folder, where)
    if choice is None and preferred:
        choice = store_choice(folder, where, {"precision": preferred})
    elif not preferred and _must_measure(choice):
        with _machine_lock():
            before, choice = choice, read_choice(folder, where)
            if choice == before:  # no process that held the lock before has measured
                found = benchmark(folder, device)
                found["tries"] = 1 + _tries(choice)
                choice = store_choice(folder, where, found, replace=choice is not None)
    return str(choice["precision"]) if choice else preferred or default_precision(where)


def _candidates(folder: Folder, device: torch.device) -> list[str]:
    """The precisions of a model that a device has."""
    suitable = suitable_precisions(folder)
    return [name for name in available_precisions(device) if name in suitable]


def _must_measure(choice: dict[str, Any] | None) -> bool:
    """Whether there is no choice, or one by speed that was not stable; one by accuracy stays."""
    if choice is None:
        return True
    is_stable = choice.get("stable", True) is not False or "texts" in choice
    return not is_stable and _tries(choice) < _MAX_TRIES


def _tries(choice: dict[str, Any] | None) -> int:
    tries = (choice or {}).get("tries", 0)
    return tries if isinstance(tries, int) else 0


@contextmanager
def _machine_lock() -> Iterator[None]:
    """Let one process of this machine measure at a time: starting replicas share its cores."""
    path = os.path.join(tempfile.gettempdir(), f"raybert-measuring-{os.getuid()}.lock")
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:  # another user's file, or a full disk: measuring in parallel is less exact
        yield
        return
    try:
        lock_file(lock)
        yield
    finally:
        os.close(lock)


def benchmark(folder: Folder, device: str) -> dict[str, Any]:
    """Measure the speed of each precision, and the difference of its scores, on random words.

    Returns `precision`, the fastest one whose probabilities are within MAX_DIFFERENCE of fp32's;
    `stable`, whether no spread exceeds MAX_SPREAD; and `measured`: by precision tokens_per_second,
    its spread, max_difference from fp32's probabilities, and batch_difference, the largest one
    between a text's probabilities alone and in a batch.
    """
    reference: npt.NDArray[np.float32] | None = None
    measured: dict[str, dict[str, float]] = {}
    for name in _candidates(folder, torch.device(device)):
        classifier = TextClassifier(folder, device=device, precision=name)
        rows = random_rows(classifier)
        compare = classifier.task.comparable
        scores = compare(classifier.score(rows))  # the first pass: kernels are selected
        reference = scores if reference is None else reference
        alone = np.concatenate([compare(classifier.score([row])) for row in rows])
        speed = _tokens_per_second(classifier, rows)
        measured[name] = {
            "tokens_per_second": speed.best,
            "spread": speed.spread,
            "max_difference": float(np.abs(scores - reference).max()),
            "batch_difference": float(np.abs(scores - alone).max()),
        }
    close = [n for n, found in measured.items() if found["max_difference"] <= MAX_DIFFERENCE]
    speeds = {name: measured[name]["tokens_per_second"] for name in close}
    return {"precision": fastest(speeds), "stable": _is_stable(measured), "measured": measured}


def compare(
    folder: Folder,
    texts: Sequence[Text],
    targets: Targets,
    device: str = "cpu",
    *,
    on_progress: Callable[[str], None],
) -> dict[str, Any]:
    """Measure each precision on labelled texts, and store the best one for this machine type.

    `targets` are those of the model's task. `on_progress` gets a line before each precision.
    Returns `precision`, the fastest one that loses at most MAX_POINTS_LOST of the task's `metric`;
    `measured`: by precision texts_per_second, its spread, that metric, loss and points_lost of the
    metric (of one without an upper bound, per cent); `stable`, as of `benchmark`; `texts`;
    `machine`; and `stored`, whether the choice could be written to the model's folder.
    """
    where = torch.device(device)
    measured: dict[str, dict[str, float]] = {}
    for name in _candidates(folder, where):
        on_progress(f"{name}: {len(texts):,} texts")
        classifier = TextClassifier(folder, device=device, precision=name)
        classifier.logits(texts[:8])
        logits, speed = _score_parts(classifier, texts)
        task = classifier.task
        scores, metric = task.evaluate(logits, targets), task.default_metric
        exact = measured.get("fp32", scores)[metric]
        measured[name] = {
            "texts_per_second": speed.best,
            "spread": speed.spread,
            metric: scores[metric],
            "loss": scores["loss"],
            "points_lost": points_lost(task, exact, scores[metric]),
        }
    speeds = {
        name: found["texts_per_second"]
        for name, found in measured.items()
        if found["points_lost"] <= MAX_POINTS_LOST
    }
    result = {
        "precision": fastest(speeds),
        "metric": metric,
        "stable": _is_stable(measured),
        "measured": measured,
        "texts": len(texts),
    }
    stored = store_choice(folder, where, result, replace=True)
    return {**result, "machine": machine_type(where), "stored": bool(stored)}


def points_lost(task: TextTask, exact: float, found: float) -> float:
    """What is lost of the task's default metric, in points; of an error, in per cent of it."""
    lost = exact - found
    if not task.selection_metrics[task.default_metric]:  # lower is better
        lost = -lost / max(abs(exact), 1e-9)
    return round(100 * lost, 3)


def fastest(speeds: dict[str, float]) -> str:
    """The fastest of `speeds`, most exact first: it beats each more exact one by MIN_SPEEDUP."""
    best, *others = speeds
    for name in others:
        if speeds[name] > MIN_SPEEDUP * speeds[best]:
            best = name
    return best


def random_rows(classifier: TextClassifier) -> list[npt.NDArray[np.int64]]:
    """Token ids of texts of random words."""
    rng = np.random.default_rng(0)
    words, longest = np.flatnonzero(~classifier.tokenizer.is_special), classifier.longest
    lengths = (min(_LENGTHS[index % len(_LENGTHS)], longest) for index in range(_TEXTS))
    return [rng.choice(words, length) for length in lengths]


class Speed(NamedTuple):
    """The best of several measurements, which another process's load changes little."""

    best: float
    spread: float  # by which part the median is below it

    @classmethod
    def of(cls, speeds: Sequence[float]) -> Speed:
        """Summarize the speeds of several passes."""
        best = max(speeds)
        return cls(round(best, 1), round(1 - statistics.median(speeds) / best, 3))


def _is_stable(measured: dict[str, dict[str, float]]) -> bool:
    return all(found["spread"] <= MAX_SPREAD for found in measured.values())


def _tokens_per_second(classifier: TextClassifier, rows: Sequence[npt.NDArray[np.int64]]) -> Speed:
    """Score rows for a while, and longer until the times of a window are alike."""
    tokens = sum(map(len, rows))
    found: list[Speed] = []
    for _ in range(_MAX_WINDOWS):
        speeds: list[float] = []
        begun = time.perf_counter()
        while len(speeds) < _MIN_PASSES or time.perf_counter() - begun < _SECONDS:
            start = time.perf_counter()
            classifier.score(rows)
            speeds.append(tokens / (time.perf_counter() - start))
        found.append(Speed.of(speeds))
        if found[-1].spread <= MAX_SPREAD:
            break
    return Speed(max(speed.best for speed in found), min(speed.spread for speed in found))


def _score_parts(classifier: TextClassifier, texts: Sequence[Text]) -> tuple[Outputs, Speed]:
    """Score texts in parts of alike lengths; again, until the parts take alike times."""
    # Every n-th text: sources are often sorted. Tokens, since few texts differ much in length.
    parts = [list(range(part, len(texts), _PARTS)) for part in range(min(_PARTS, len(texts)))]
    outputs: dict[int, Any] = {}
    found: list[Speed] = []
    for _ in range(_MAX_WINDOWS):
        speeds = []
        for part in parts:
            rows = classifier.encode([texts[i] for i in part])
            start = time.perf_counter()
            scored = classifier.logits([texts[i] for i in part])
            seconds = time.perf_counter() - start
            speeds.append(sum(map(len, rows)) / seconds)
            outputs.update(zip(part, scored, strict=True))
        found.append(Speed.of(speeds))
        if found[-1].spread <= MAX_SPREAD:
            break
    tokens = sum(map(len, classifier.encode(texts)))
    best = max(speed.best for speed in found) * len(texts) / max(1, tokens)
    ordered = [outputs[i] for i in range(len(texts))]
    together: Outputs = ordered if classifier.task.is_per_token else np.stack(ordered)
    return together, Speed(round(best, 1), min(speed.spread for speed in found))
