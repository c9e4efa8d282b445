"""Let a new model answer a share of the requests, and compare it with the current one.

A failing canary costs no answer: the current model has scored the texts first, and its scores are
used where the canary fails, is full or is slow.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from raybert.serve.request_errors import RequestError
from raybert.serve.runtime.batching import ModelFailed, Overloaded
from raybert.serve.runtime.loaded_models import LoadedModel
from raybert.serve.runtime.metrics import Metrics

_SHARE_OF_TIME = 0.5  # of a request's remaining time; the rest is for explaining and sending
_LOG_INTERVAL_S = 10.0  # between two log lines about failures


class Scored(NamedTuple):
    """The logits of a request's texts, and the model that computed them."""

    logits: npt.NDArray[np.float32]  # [texts, labels]
    model: LoadedModel


class Canary:
    """Selects requests and compares both models. Its methods belong to one event loop."""

    def __init__(self, share: float, metrics: Metrics, log: logging.Logger) -> None:
        """Set up; `share` of the requests are selected, 0: none."""
        self._share, self._metrics, self._log = share, metrics, log
        self._unlogged, self._logged_at = 0, -math.inf  # failures

    def is_selected(self) -> bool:
        """Draw whether the canary scores a request."""
        return self._share > 0 and random.random() < self._share

    async def replace(
        self,
        current: Scored,
        canary: LoadedModel,
        score: Callable[[], Awaitable[npt.NDArray[np.float32]]],
        remaining_s: float,
    ) -> Scored:
        """Return the canary's scores, or the current model's where it has none in time.

        Args:
            current: of the current model.
            canary: the new model.
            score: computes the canary's logits.
            remaining_s: seconds until the request's time-out.
        """
        try:
            async with asyncio.timeout(_SHARE_OF_TIME * remaining_s):
                new = Scored(await score(), canary)
        except (Overloaded, ModelFailed, RequestError, TimeoutError) as error:
            self._count_failure(canary, error)
            return current
        self._compare(current, new)
        return new

    def _count_failure(self, canary: LoadedModel, error: Exception) -> None:
        """Count a failure; the log gets one line per interval with their number."""
        self._metrics.add("canary_missed_total", model=canary.name)
        self._unlogged += 1
        now = time.monotonic()
        if now >= self._logged_at + _LOG_INTERVAL_S:
            cause = "it took too long" if isinstance(error, TimeoutError) else error
            self._log.error("the canary failed: %s (requests: %d)", cause, self._unlogged)
            self._unlogged, self._logged_at = 0, now

    def _compare(self, current: Scored, new: Scored) -> None:
        """Count equal labels, and add up the difference of the scores of the current label."""
        before, after = (s.model.classifier.calibrated(s.logits) for s in (current, new))
        for old_scores, new_scores in zip(before, after, strict=True):
            label = current.model.labels[int(old_scores.argmax())]
            agree = label == new.model.labels[int(new_scores.argmax())]
            by_label = dict(zip(new.model.labels, new_scores.tolist(), strict=True))
            difference = abs(float(old_scores.max()) - by_label.get(label, 0.0))
            self._metrics.add("canary_total", model=new.model.name, agree=str(agree).lower())
            self._metrics.add("canary_difference_total", difference, model=new.model.name)
