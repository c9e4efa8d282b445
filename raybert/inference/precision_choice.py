"""Choosing a precision: by speed at start-up, or with `raybert bench serve` by accuracy, too."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raybert.inference import precision as precisions
from raybert.inference.classifier import TextClassifier, softmax
from raybert.storage.folder import Folder
from raybert.tasks.classification_metrics import classification_scores

MOST_POINTS = 0.5  # of accuracy that a faster precision may cost
MOST_DIFFERENCE = 0.05  # between probabilities, where there are no labels to measure accuracy by
GAIN = 1.05  # by which a precision must be faster than the plainer ones before it
_LENGTHS = (16, 48, 96, 160, 240, 320, 400, 512)
_ROWS = 24
_SECONDS = 1.0  # of measuring each precision, after its first pass


def select_precision(folder: Folder, device: str, preferred: str | None = None) -> str:
    """The precision that all replicas on machines of this type take.

    Measures unless a choice is stored, and stores what it finds. Where the model can't be written
    to, what replicas measure could differ, so that the rule of thumb is taken.

    Args:
        folder: the model.
        device: cpu or cuda.
        preferred: is stored without measuring: for a version that replaces another one.
    """
    where = torch.device(device)
    chosen = precisions.stored(folder, where)
    if chosen is None and preferred:
        chosen = precisions.store(folder, where, {"precision": preferred})
    elif chosen is None:
        with _alone():
            chosen = precisions.stored(folder, where)  # by who was here before
            chosen = chosen or precisions.store(folder, where, benchmark(folder, device))
    return str(chosen["precision"]) if chosen else preferred or precisions.fallback(where)


@contextmanager
def _alone() -> Iterator[None]:
    """Measure one after the other on a machine: replicas that start at once share its cores."""
    path = os.path.join(tempfile.gettempdir(), f"raybert-measuring-{os.getuid()}.lock")
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:  # somebody else's, or there is no room: what is measured is only less exact
        yield
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def benchmark(folder: Folder, device: str) -> dict[str, Any]:
    """Measure every precision on texts of random words: speed, and how far scores move.

    Returns:
        precision: the fastest one whose probabilities stay within MOST_DIFFERENCE of fp32's.
        measured: by precision, tokens_per_second, max_difference from fp32's probabilities, and
            company: how far probabilities differ between a text alone and in a batch.
    """
    reference: npt.NDArray[np.float32] | None = None
    measured: dict[str, dict[str, float]] = {}
    for name in precisions.available(torch.device(device)):
        classifier = TextClassifier(folder, device=device, precision=name)
        rows = _random_rows(classifier)
        scores = softmax(classifier.score(rows))  # the first pass: kernels are chosen
        reference = scores if reference is None else reference
        alone = softmax(np.concatenate([classifier.score([row]) for row in rows]))
        measured[name] = {
            "tokens_per_second": _speed(classifier, rows),
            "max_difference": float(np.abs(scores - reference).max()),
            "company": float(np.abs(scores - alone).max()),
        }
    good = [n for n, found in measured.items() if found["max_difference"] <= MOST_DIFFERENCE]
    speeds = {name: measured[name]["tokens_per_second"] for name in good}
    return {"precision": fastest(speeds), "measured": measured}


def compare(
    folder: Folder,
    texts: Sequence[str],
    labels: npt.NDArray[np.int64],
    device: str = "cpu",
    *,
    on_progress: Callable[[str], None],
) -> dict[str, Any]:
    """Measure every precision on labelled texts, and store the best for this machine type.

    Args:
        folder: the model.
        texts: raw texts.
        labels: [texts] int, indices into the model's labels.
        device: cpu or cuda.
        on_progress: is told what is being measured.

    Returns:
        precision: the fastest one that costs at most MOST_POINTS of accuracy.
        measured: by precision, texts_per_second, accuracy, loss, and points of accuracy lost.
        stored: whether it could be kept with the model.
    """
    measured: dict[str, dict[str, float]] = {}
    for name in precisions.available(torch.device(device)):
        on_progress(f"{name}: {len(texts):,} texts")
        classifier = TextClassifier(folder, device=device, precision=name)
        classifier.logits(texts[:8])
        begun = time.perf_counter()
        logits = classifier.logits(texts)
        seconds = time.perf_counter() - begun
        scores = classification_scores(logits / classifier.temperature, labels, classifier.labels)
        exact = measured.get("fp32", scores)["accuracy"]
        measured[name] = {
            "texts_per_second": round(len(texts) / seconds, 1),
            "accuracy": scores["accuracy"],
            "loss": scores["loss"],
            "points_lost": round(100 * (exact - scores["accuracy"]), 3),
        }
    speeds = {
        name: found["texts_per_second"]
        for name, found in measured.items()
        if found["points_lost"] <= MOST_POINTS
    }
    result = {"precision": fastest(speeds), "measured": measured, "texts": len(texts)}
    kept = precisions.store(folder, torch.device(device), result, replace=True)
    return {**result, "machine": precisions.machine(torch.device(device)), "stored": bool(kept)}


def fastest(speeds: dict[str, float]) -> str:
    """The fastest precision, in order from the plainest; a later one must be worth its cost."""
    best, *others = speeds
    for name in others:
        if speeds[name] > GAIN * speeds[best]:
            best = name
    return best


def _random_rows(classifier: TextClassifier) -> list[npt.NDArray[np.int64]]:
    """Texts of random words, of lengths as they come."""
    rng = np.random.default_rng(0)
    words, longest = np.flatnonzero(~classifier.tokenizer.is_special), classifier.longest
    lengths = (min(_LENGTHS[index % len(_LENGTHS)], longest) for index in range(_ROWS))
    return [rng.choice(words, length) for length in lengths]


def _speed(classifier: TextClassifier, rows: Sequence[npt.NDArray[np.int64]]) -> float:
    """Tokens per second of the best of some passes, so that a busy moment does not choose."""
    tokens, best, begun = sum(map(len, rows)), float("inf"), time.perf_counter()
    while time.perf_counter() - begun < _SECONDS:
        start = time.perf_counter()
        classifier.score(rows)
        best = min(best, time.perf_counter() - start)
    return round(tokens / best, 1)
