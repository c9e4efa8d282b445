"""A replica's work on a request, independent of HTTP and of Ray.

Tokenization runs in one thread, models in others, explanations and masks in one more; the event
loop coordinates them. A canary may score a share of the requests.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from raybert.inference.classifier import Encoded, Text
from raybert.inference.explanations import Explanation
from raybert.serve import request_errors
from raybert.serve.request_errors import RequestError
from raybert.serve.runtime.batching import ModelFailed, ModelThreads, Overloaded, run_in_new_thread
from raybert.serve.runtime.loaded_models import LoadedModel, LoadedModels
from raybert.serve.runtime.metrics import ServeMetrics
from raybert.serve.runtime.serial_executor import (
    Filled,
    NewThreadExecutor,
    SerialExecutor,
    fill_masks,
)
from raybert.serve.settings import ServeConfig
from raybert.tasks.entities import Word
from raybert.tasks.protocol import AnswerOptions, Outputs

_MAX_SERIAL_REQUESTS = 8  # for explanations or masks, waiting or running
_MAX_UNTOKENIZED = 8 << 20  # characters that wait for tokenization: about a second
_NEWEST_WEIGHT = 0.05  # of the last request in the moving average of tokens per character
_STUCK_S = 120  # duration of a batch after which a replica is unhealthy
_CANARY_TIME = 0.5  # share of a request's remaining time; the rest is for explaining and sending
_LOG_INTERVAL_S = 10.0  # between two log lines about failures of the canary


class Scored(NamedTuple):
    """The outputs of a request's texts, the model that computed them, and which texts were cut."""

    outputs: Outputs
    model: LoadedModel
    is_cut: Sequence[bool]


class Service:
    """The models of a replica. Its coroutines belong to one event loop."""

    def __init__(
        self,
        config: ServeConfig,
        *,
        device: str = "cpu",
        threads: int | None = None,
        metrics: ServeMetrics | None = None,
        log: logging.Logger | None = None,
    ) -> None:
        """Set up without loading anything; `threads` compute, None: PyTorch's default."""
        self.config, self.metrics = config, metrics or ServeMetrics()
        self._log = log or logging.getLogger("raybert.serve")
        self._tokenizer_thread = ThreadPoolExecutor(1, "tokenize")
        self._threads = ModelThreads(threads, device=device)
        self._serial_thread = NewThreadExecutor("serial", threads)
        self._serial = SerialExecutor(self._serial_thread, _MAX_SERIAL_REQUESTS)
        self._untokenized = 0  # characters that wait for tokenization
        self._tokens_per_character = 0.2  # moving average
        share = config.canary.share if config.canary else 0.0
        self._canary = Canary(share, self.metrics, self._log)
        self._load_at, self._load_busy_s = time.monotonic(), 0.0
        self.models = LoadedModels(config, self._threads, self.metrics, self._log, device)
        self.metrics.watch_queue(
            lambda: sum(model.batcher.queued_tokens for model in self.models.all())
        )

    def load(self) -> None:
        """Load the models: seconds, or longer where the precision is chosen by measuring."""
        run_in_new_thread(self.models.load, self._threads.threads)

    def close(self) -> None:
        """Stop the threads."""
        self._threads.close()
        for executor in (self._tokenizer_thread, self._serial_thread):
            executor.shutdown(wait=False, cancel_futures=True)

    def check_health(self) -> None:
        """Raise RuntimeError if a batch does not end: the replica must be replaced."""
        for model in self.models.all():
            seconds = model.batcher.running_s
            if seconds > _STUCK_S:
                raise RuntimeError(f"model {model.name}: a batch has run for {seconds:.0f} s")

    def load_since_last(self) -> float:
        """Return the load since the last call, as `deploy.scaling` reads it.

        The models share the threads: of their waiting work the most counts, as for admission.
        """
        now = time.monotonic()
        models = self.models.all()
        busy_s = sum(model.batcher.busy_s for model in models)
        elapsed = max(1e-9, now - self._load_at)
        share = min(1.0, max(0.0, busy_s - self._load_busy_s) / elapsed)
        self._load_at, self._load_busy_s = now, busy_s
        fill = max((model.batcher.fill for model in models), default=0.0)
        return max(share + min(1.0, fill), self._serial.fill)

    def full_for_s(self, size: int) -> float | None:
        """Return the seconds until a full queue is empty; None: a request can be accepted.

        `size` bytes of its body have at least so many tokens that it can be rejected before they
        are read; 0: unknown. Only the body names its model: the queues of all classifiers must be
        full.
        """
        cuts, rate = self.config.long_texts == "cut", self._tokens_per_character
        waits = []
        for model in self.models.classifiers.values():
            tokens = model.batcher.mean_request_tokens
            if size:
                tokens = min(tokens, size * rate)
                tokens = min(tokens, model.classifier.longest) if cuts else tokens
            waits.append(model.batcher.full_for_s(tokens))
        full = [wait for wait in waits if wait is not None]
        return min(full) if full and len(full) == len(waits) else None

    def find(self, name: str | None) -> LoadedModel:
        """Return a classifier by name, None: the default; or raise RequestError, 404."""
        models = self.models
        model = models.default if name is None else models.classifiers.get(name)
        if model is None:
            known = ", ".join(models.classifiers) or "none, only masks are filled here"
            raise request_errors.not_found(f"no such classifier; classifiers: {known}")
        return model

    async def score(self, texts: Sequence[Text], name: str | None, truncate: bool | None) -> Scored:
        """Compute the outputs of at least one text, or pair for a model of pairs.

        Without a model's name the default scores, and for a share of the requests the canary.
        `truncate` cuts long texts, False reads them in windows; None: as configured.

        Raises:
            RequestError: 404, no such model; 413, too many tokens; 422, not tokenizable.
            Overloaded: the queue is full.
            ModelFailed: the model raised an exception, or logits are not finite.
        """
        loop = asyncio.get_running_loop()
        model, begun = self.find(name), loop.time()
        windows = self.config.long_texts == "windows" if truncate is None else not truncate
        expected = self._expected_tokens(model, texts, windows)
        with model.batcher.reserve(expected):
            encoded = await self._encode(model, texts, windows)
        outputs = await model.score(encoded)
        scored, canary = Scored(outputs, model, encoded.is_cut), self.models.canary
        if canary is not None and name is None and self._canary.is_selected():
            remaining_s = self.config.timeout_s - (loop.time() - begun)

            async def score_with_canary() -> Scored:
                encoded = await self._encode(canary, texts, windows)
                outputs = await canary.score(encoded)
                return Scored(outputs, canary, encoded.is_cut)

            scored = await self._canary.replace(scored, canary, score_with_canary, remaining_s)
        self.metrics.add("texts_total", len(texts), model=scored.model.name)
        return scored

    def _expected_tokens(self, model: LoadedModel, texts: Sequence[Text], windows: bool) -> int:
        """Estimate the tokens of texts by their characters; truncation limits those of each."""
        rate = self._tokens_per_character
        if windows:
            return int(sum(map(_characters, texts)) * rate)
        longest = model.classifier.longest
        return int(sum(min(_characters(text) * rate, longest) for text in texts))

    async def _encode(self, model: LoadedModel, texts: Sequence[Text], windows: bool) -> Encoded:
        characters = sum(map(_characters, texts))
        if self._untokenized and self._untokenized + characters > _MAX_UNTOKENIZED:
            raise Overloaded(1.0)
        self._untokenized += characters
        encode = functools.partial(model.encode, texts, windows=windows)
        loop = asyncio.get_running_loop()
        try:
            encoded = await loop.run_in_executor(self._tokenizer_thread, encode)
        except Exception as error:
            self._log.error("a text can't be tokenized: %s", type(error).__name__)
            raise request_errors.not_tokenizable("a text can't be turned into tokens") from None
        finally:
            self._untokenized -= characters
        tokens = sum(map(len, encoded.rows))
        if not any(encoded.is_cut):
            rate = tokens / characters
            self._tokens_per_character += _NEWEST_WEIGHT * (rate - self._tokens_per_character)
        if tokens > self.config.max_tokens:
            raise request_errors.too_large(
                f"{tokens:,} tokens are more than the {self.config.max_tokens:,} that are read in "
                "a request; send fewer or shorter texts, or truncate=true"
            )
        return encoded

    async def answer(
        self, texts: Sequence[Text], scored: Scored, options: AnswerOptions
    ) -> list[Any]:
        """Return the task's answer for each text; elements of one that was cut say so."""
        words = await self.words(texts, scored)
        answers = scored.model.classifier.task.answers(scored.outputs, words, options)
        for answer, is_cut in zip(answers, scored.is_cut, strict=True):
            if is_cut:
                for element in answer:
                    element["truncated"] = True
        return answers

    async def words(self, texts: Sequence[Text], scored: Scored) -> list[list[Word]] | None:
        """Return the words of each text, for a task on tokens; None for others."""
        classifier = scored.model.classifier
        if not classifier.task.is_per_token:
            return None
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenizer_thread, classifier.words, texts)

    async def explain(self, texts: Sequence[Text], scored: Scored) -> list[Explanation]:
        """Explain what was predicted for each text, or raise Overloaded or ModelFailed."""
        model, task = scored.model, scored.model.classifier.task
        # A long text's tokens, in windows, are not those that are explained.
        chosen = [
            None if task.is_per_token else task.choose(torch.from_numpy(row))
            for row in map(np.asarray, scored.outputs)
        ]

        def explain(text: Text, choice: Any) -> Explanation:
            return model.explainer.explain(text, choice)

        with self._serial.reserve() as slot:
            return [
                await slot.run(functools.partial(explain, text, choice))
                for text, choice in zip(texts, chosen, strict=True)
            ]

    async def fill_masks(
        self, texts: Sequence[str], top_k: int, targets: Sequence[str] | None = None
    ) -> list[Filled]:
        """As `serial_executor.fill_masks`, or raise RequestError, 404, or Overloaded."""
        mask_filler = self.models.mask_filler
        if mask_filler is None:
            raise request_errors.not_found(
                "no model that fills masks is served here (serve.fill_mask)"
            )
        with self._serial.reserve() as slot:
            return await fill_masks(mask_filler, texts, top_k, slot, targets)


class Canary:
    """Selects requests for a new model, and compares it with the current one.

    The current model has scored the texts first: its scores are used where the canary fails, is
    full or is slow. All methods belong to one event loop.
    """

    def __init__(self, share: float, metrics: ServeMetrics, log: logging.Logger) -> None:
        self._share, self._metrics, self._log = share, metrics, log
        self._unlogged, self._logged_at = 0, -math.inf  # failures

    def is_selected(self) -> bool:
        """Draw whether the canary scores a request."""
        return self._share > 0 and random.random() < self._share

    async def replace(
        self,
        current: Scored,
        canary: LoadedModel,
        score: Callable[[], Awaitable[Scored]],
        remaining_s: float,
    ) -> Scored:
        """Return the canary's scores, or the current ones if it has none in time.

        `score` computes with the canary; `remaining_s`: until the request's time-out.
        """
        try:
            async with asyncio.timeout(_CANARY_TIME * remaining_s):
                new = await score()
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
        """Count equal decisions, and add up the difference of the scores of the current ones."""
        before, after = current.model.classifier.task, new.model.classifier.task
        for old_outputs, new_outputs in zip(current.outputs, new.outputs, strict=True):
            decided = before.decision(np.asarray(old_outputs))
            scores = after.named_scores(np.asarray(new_outputs))
            agree = decided.keys() == after.decision(np.asarray(new_outputs)).keys()
            difference = max(
                (abs(score - scores.get(name, 0.0)) for name, score in decided.items()), default=0.0
            )
            self._metrics.add("canary_total", model=new.model.name, agree=str(agree).lower())
            self._metrics.add("canary_difference_total", difference, model=new.model.name)


def _characters(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(map(len, text))
