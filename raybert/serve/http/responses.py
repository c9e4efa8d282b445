"""What is told of the scores of texts: labels in their order, and the words that decided."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from raybert.inference.explanations import Explanation
from raybert.serve.http import schemas
from raybert.serve.http.schemas import PredictRequest
from raybert.serve.runtime.loaded_model import LoadedModel
from raybert.serve.runtime.serial_executor import Turn
from raybert.serve.settings import ServeConfig

_MOST_EXPLAINED = 8  # texts of a request


def ranked(
    logits: npt.NDArray[np.float32], served: LoadedModel, request: PredictRequest
) -> list[Any]:
    """For each text its labels with their scores, the likeliest first."""
    scores = logits if request.raw_scores else served.classifier.calibrated(logits)
    shown = None if request.all_scores else 1
    return [
        [
            {"label": served.labels[i], "score": round(float(row[i]), 6)}
            for i in np.argsort(-row, kind="stable")[:shown]
        ]
        for row in scores
    ]


def check_explain(config: ServeConfig, texts: Sequence[str]) -> None:
    """Refuse what is not explained.

    Raises:
        Refused: nothing is, or not so many texts at once.
    """
    if not config.explain:
        raise schemas.invalid("explain: this server does not explain (serve.explain)")
    if len(texts) > _MOST_EXPLAINED:
        raise schemas.too_large(
            f"{len(texts)} texts are more than the {_MOST_EXPLAINED} that are explained in a "
            "request"
        )


async def explained(
    texts: Sequence[str],
    logits: npt.NDArray[np.float32],
    answers: Sequence[Any],
    served: LoadedModel,
    turn: Turn,
) -> list[Any]:
    """The answers, each with the words that decided for its likeliest label.

    Raises:
        Failed: the model failed.
    """
    found = []
    labels = logits.argmax(axis=1).tolist()
    for text, label, scores in zip(texts, labels, answers, strict=True):
        # The explainer is made in the thread that uses it, at its first text.
        explanation = await turn.run(functools.partial(_explain, served, text, label))
        words = [vars(word) for word in explanation.words]
        found.append({"predictions": scores, "words": words, "error": explanation.error})
    return found


def _explain(served: LoadedModel, text: str, label: int) -> Explanation:
    return served.explainer.explain(text, label)
