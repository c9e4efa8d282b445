"""A new model on trial: it answers a share of the requests, and is compared with the one before.

Nothing that it does costs an answer: the first model has scored the texts before it is asked, and
stands in for it where it fails, is full or is slow.
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

from raybert.serve.http.schemas import RequestError
from raybert.serve.runtime.batching import Failed, Overloaded
from raybert.serve.runtime.loaded_model import LoadedModel
from raybert.serve.runtime.metrics import Metrics

_SHARE_OF_TIME = 0.5  # of what a request has left: its answer must still be sent, or explained
_TELL_S = 10.0  # between two lines of the log


class Scored(NamedTuple):
    """The scores of a request's texts, and the model that gave them."""

    logits: npt.NDArray[np.float32]  # [texts, labels]
    served: LoadedModel


class Canary:
    """Asks the canary in the first model's place. Its methods belong to one event loop."""

    def __init__(self, share: float, metrics: Metrics, log: logging.Logger) -> None:
        """Set up; `share` is of the requests, 0: there is no canary."""
        self._share, self._metrics, self._log = share, metrics, log
        self._missed, self._told = 0, -math.inf  # answers that no line has told of; when one did

    def draws(self) -> bool:
        """Whether a request is among those that it answers."""
        return self._share > 0 and random.random() < self._share

    async def ask(
        self,
        mine: Scored,
        canary: LoadedModel,
        score: Callable[[], Awaitable[npt.NDArray[np.float32]]],
        seconds: float,
    ) -> Scored:
        """The canary's scores, or the first model's where it does not give any.

        Args:
            mine: the first model's.
            canary: the model on trial.
            score: asks it.
            seconds: that the request has left.
        """
        try:
            async with asyncio.timeout(_SHARE_OF_TIME * seconds):
                theirs = Scored(await score(), canary)
        except (Overloaded, Failed, RequestError, TimeoutError) as error:
            self._miss(canary, error)
            return mine
        self._compare(mine, theirs)
        return theirs

    def _miss(self, canary: LoadedModel, error: Exception) -> None:
        """Count it; an overload makes many of them, which share a line of the log."""
        self._metrics.add("canary_missed_total", model=canary.name)
        self._missed += 1
        now = time.monotonic()
        if now >= self._told + _TELL_S:
            reason = "it took too long" if isinstance(error, TimeoutError) else error
            self._log.error("the canary failed: %s (requests: %d)", reason, self._missed)
            self._missed, self._told = 0, now

    def _compare(self, old: Scored, new: Scored) -> None:
        """Count whether both models give the same label, and how far its scores differ."""
        before, after = (s.served.classifier.calibrated(s.logits) for s in (old, new))
        for mine, theirs in zip(before, after, strict=True):
            label = old.served.labels[int(mine.argmax())]
            agree = label == new.served.labels[int(theirs.argmax())]
            named = dict(zip(new.served.labels, theirs.tolist(), strict=True))
            difference = abs(float(mine.max()) - named.get(label, 0.0))
            self._metrics.add("canary_total", model=new.served.name, agree=str(agree).lower())
            self._metrics.add("canary_difference_total", difference, model=new.served.name)
