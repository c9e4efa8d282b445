"""A replica's work on a request, independent of HTTP and of Ray.

Tokenization runs in one thread, models in others, explanations and masks in one more: the event
loop only coordinates them.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from raybert.inference.classifier import Row
from raybert.inference.explanations import Explanation
from raybert.serve import request_errors
from raybert.serve.runtime import mask_requests
from raybert.serve.runtime.batching import Overloaded
from raybert.serve.runtime.canary import Canary, Scored
from raybert.serve.runtime.loaded_models import LoadedModel, LoadedModels
from raybert.serve.runtime.metrics import Metrics
from raybert.serve.runtime.serial_executor import SerialExecutor
from raybert.serve.runtime.threads import ModelThreads, NewThreadExecutor, run_in_new_thread
from raybert.serve.settings import ServeConfig

_MAX_SERIAL_REQUESTS = 8  # for explanations or masks, waiting or running
_MAX_UNTOKENIZED = 8 << 20  # characters that wait for tokenization: about a second
_NEWEST_WEIGHT = 0.05  # of the last request in the moving average of tokens per character
_STUCK_S = 120  # duration of a batch after which a replica is unhealthy


class Service:
    """The models of a replica. Its coroutines belong to one event loop."""

    def __init__(
        self,
        config: ServeConfig,
        *,
        device: str = "cpu",
        threads: int | None = None,
        metrics: Metrics | None = None,
        log: logging.Logger | None = None,
    ) -> None:
        """Set up without loading anything.

        Args:
            config: at least one of `model` and `fill_mask` is set.
            device: cpu or cuda.
            threads: for a model's computation; None: PyTorch's default.
            metrics: of this replica.
            log: gets failures, without texts.
        """
        self.config, self.metrics = config, metrics or Metrics()
        self._log = log or logging.getLogger("raybert.serve")
        self._tokenizer_thread = ThreadPoolExecutor(1, "tokenize")
        self._threads = ModelThreads(threads, device=device)
        self._serial_thread = NewThreadExecutor("serial", threads)
        self._serial = SerialExecutor(self._serial_thread, _MAX_SERIAL_REQUESTS)
        self._untokenized = 0  # characters that wait for tokenization
        self._tokens_per_character = 0.2  # moving average
        share = config.canary.share if config.canary else 0.0
        self._canary = Canary(share, self.metrics, self._log)
        self.models = LoadedModels(config, self._threads, self.metrics, self._log, device)
        self.metrics.add_gauge(
            "queued_tokens",
            "Tokens that wait in the queues of all models.",
            lambda: sum(model.batcher.queued for model in self.models.all()),
        )

    def load(self) -> None:
        """Load the models: seconds, or longer where the precision is chosen by measuring.

        Raises:
            UserError: a model does not exist or is of the wrong kind.
            DamagedError: a file is cut short or altered.
        """
        run_in_new_thread(self.models.load, self._threads.threads)

    def close(self) -> None:
        """Stop the threads."""
        self._threads.close()
        for executor in (self._tokenizer_thread, self._serial_thread):
            executor.shutdown(wait=False, cancel_futures=True)

    def check_health(self) -> None:
        """Check that no batch is stuck.

        Raises:
            RuntimeError: one is; the replica must be replaced.
        """
        for model in self.models.all():
            seconds = model.batcher.running_s
            if seconds > _STUCK_S:
                raise RuntimeError(f"model {model.name}: a batch has run for {seconds:.0f} s")

    def full_for_s(self) -> float | None:
        """Return the seconds until a full queue has room; None: a request can be accepted.

        Only the request's body names its model: the queues of all classifiers must be full.
        """
        waits = [model.batcher.full_for_s() for model in self.models.classifiers.values()]
        full = [wait for wait in waits if wait is not None]
        return min(full) if full and len(full) == len(waits) else None

    def find(self, name: str | None) -> LoadedModel:
        """Return a classifier by name; None: the default.

        Raises:
            RequestError: 404, there is none.
        """
        models = self.models
        model = models.default if name is None else models.classifiers.get(name)
        if model is None:
            known = ", ".join(models.classifiers) or "none, only masks are filled here"
            raise request_errors.not_found(f"no such classifier; classifiers: {known}")
        return model

    async def score(self, texts: Sequence[str], name: str | None, truncate: bool | None) -> Scored:
        """Compute the logits of texts.

        Args:
            texts: not empty.
            name: of the model; None: the default, or for a share of the requests the canary.
            truncate: True cuts long texts, False reads them in windows; None: as configured.

        Raises:
            RequestError: 404, no such model; 413, too many tokens; 422, not tokenizable.
            Overloaded: the queue is full.
            ModelFailed: the model raised an exception, or logits are not finite.
        """
        loop = asyncio.get_running_loop()
        model, begun = self.find(name), loop.time()
        windows = self.config.long_texts == "windows" if truncate is None else not truncate
        expected = self._expected_tokens(model, texts, windows)
        model.batcher.check(expected)
        with model.batcher.expecting(expected):
            rows, counts = await self._encode(model, texts, windows)
        scored, canary = Scored(await model.score(rows, counts), model), self.models.canary
        if canary is not None and name is None and self._canary.is_selected():
            remaining_s = self.config.timeout_s - (loop.time() - begun)

            async def score_with_canary() -> npt.NDArray[np.float32]:
                return await canary.score(*await self._encode(canary, texts, windows))

            scored = await self._canary.replace(scored, canary, score_with_canary, remaining_s)
        self.metrics.add("texts_total", len(texts), model=scored.model.name)
        return scored

    def _expected_tokens(self, model: LoadedModel, texts: Sequence[str], windows: bool) -> int:
        """Estimate the tokens of texts by their characters; truncation limits those of each."""
        rate = self._tokens_per_character
        if windows:
            return int(sum(map(len, texts)) * rate)
        longest = model.classifier.longest
        return int(sum(min(len(text) * rate, longest) for text in texts))

    async def _encode(
        self, model: LoadedModel, texts: Sequence[str], windows: bool
    ) -> tuple[list[Row], list[int]]:
        characters = sum(map(len, texts))
        if self._untokenized and self._untokenized + characters > _MAX_UNTOKENIZED:
            raise Overloaded(1.0)
        self._untokenized += characters
        encode = functools.partial(model.encode, texts, windows=windows)
        loop = asyncio.get_running_loop()
        try:
            rows, counts = await loop.run_in_executor(self._tokenizer_thread, encode)
        except Exception as error:
            self._log.error("a text can't be tokenized: %s", type(error).__name__)
            raise request_errors.not_tokenizable("a text can't be turned into tokens") from None
        finally:
            self._untokenized -= characters
        lengths = [len(row) for row in rows]
        tokens = sum(lengths)
        if windows or max(lengths) < model.classifier.longest:  # no characters were cut off
            rate = tokens / characters
            self._tokens_per_character += _NEWEST_WEIGHT * (rate - self._tokens_per_character)
        if tokens > self.config.max_tokens:
            raise request_errors.too_large(
                f"{tokens:,} tokens are more than the {self.config.max_tokens:,} that are read in "
                "a request; send fewer or shorter texts, or truncate=true"
            )
        return rows, counts

    async def explain(self, texts: Sequence[str], scored: Scored) -> list[Explanation]:
        """Explain the likeliest label of each text.

        Raises:
            Overloaded: too many requests wait.
            ModelFailed: the model raised an exception.
        """
        model, labels = scored.model, scored.logits.argmax(axis=1).tolist()

        def explain_one(text: str, label: int) -> Explanation:
            return model.explainer.explain(text, label)

        with self._serial.reserve() as slot:
            return [
                await slot.run(functools.partial(explain_one, text, label))
                for text, label in zip(texts, labels, strict=True)
            ]

    async def fill_masks(self, texts: Sequence[str], top_k: int) -> list[mask_requests.Filled]:
        """Return the `top_k` likeliest tokens for each mask of each text.

        Raises:
            RequestError: 404, no model fills masks here; 413, too many texts or guesses.
            DataError: a text has no mask, or is too long.
            Overloaded: too many requests wait.
            ModelFailed: the model raised an exception.
        """
        mask_filler = self.models.mask_filler
        if mask_filler is None:
            raise request_errors.not_found(
                "no model that fills masks is served here (serve.fill_mask)"
            )
        with self._serial.reserve() as slot:
            return await mask_requests.fill_masks(mask_filler, texts, top_k, slot)
