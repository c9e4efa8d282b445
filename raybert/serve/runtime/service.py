"""What a replica does with a request, apart from HTTP and apart from Ray.

Tokenization runs in one thread, models in others, explanations and masks in one more: the event
loop only passes things on.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from raybert.errors import DataError
from raybert.inference.windows import Row
from raybert.serve.http import info, responses, schemas
from raybert.serve.http.schemas import FillMaskRequest, PredictRequest
from raybert.serve.runtime import mask_requests
from raybert.serve.runtime.batching import Failed, Overloaded
from raybert.serve.runtime.canary import Canary, Scored
from raybert.serve.runtime.loaded_model import LoadedModel
from raybert.serve.runtime.loaded_models import LoadedModels
from raybert.serve.runtime.metrics import Metrics
from raybert.serve.runtime.serial_executor import SerialExecutor
from raybert.serve.runtime.threads import ModelThreads, NewThreadExecutor, run_in_new_thread
from raybert.serve.settings import ServeConfig

_ASIDE = 8  # explanations and masks that may wait
_MOST_CHARACTERS = 8 << 20  # that wait to be tokenized: about a second of it
_MEMORY = 0.05  # weight of the newest request in the tokens that are expected of a text
_STUCK_S = 120  # of one batch, after which a replica is no good any more


class Service:
    """The models of a replica, and their answers. Its coroutines belong to one event loop."""

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
            config: what is served, and how; `model` or `fill_mask` is set.
            device: cpu or cuda.
            threads: that a model computes with; None: as PyTorch has it.
            metrics: of this replica.
            log: is told what goes wrong, without texts.
        """
        self.config, self.metrics = config, metrics or Metrics()
        self._log = log or logging.getLogger("raybert.serve")
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")
        self._workers = ModelThreads(threads, device=device)
        self._beside = NewThreadExecutor("beside", threads)
        self._aside = SerialExecutor(self._beside, _ASIDE)
        self._characters = 0  # that wait to be tokenized
        self._tokens_a_character = 0.2  # of the last requests
        share = config.canary.share if config.canary else 0.0
        self._trial = Canary(share, self.metrics, self._log)
        self.catalog = LoadedModels(config, self._workers, self.metrics, self._log, device)
        self.metrics.add_gauge(
            "queued_tokens",
            "Tokens that wait in the queues of all models.",
            lambda: sum(served.batcher.queued for served in self.catalog.all()),
        )

    def load(self) -> None:
        """Load the models; takes seconds, or longer where a precision is chosen by measuring.

        Raises:
            UserError: a model is not there, or is none of its kind.
            DamagedError: a file is cut short or altered.
        """
        run_in_new_thread(self.catalog.load, self._workers.threads)

    def close(self) -> None:
        """Let the threads end."""
        self._workers.close()
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        self._beside.shutdown(wait=False, cancel_futures=True)

    # State ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise where a replica must be replaced: a batch does not come to its end.

        Raises:
            RuntimeError: it does not.
        """
        for served in self.catalog.all():
            seconds = served.batcher.running_s
            if seconds > _STUCK_S:
                raise RuntimeError(f"model {served.name}: a batch has run for {seconds:.0f} s")

    def check_queue(self) -> None:
        """Refuse a request before it is read, where the queues of all classifiers are full.

        Raises:
            Refused: 429.
        """
        waits = []
        for served in self.catalog.served.values():
            try:
                served.batcher.check()
            except Overloaded as error:
                waits.append(error.wait_s)
            else:
                return  # which queue it will want only the request says
        if waits:
            raise schemas.overloaded(min(waits))

    def info(self) -> dict[str, Any]:
        """What is served."""
        return info.describe(self.config, self.catalog)

    def find(self, name: str | None) -> LoadedModel:
        """A classifier by name; None: the first.

        Raises:
            Refused: there is none.
        """
        served = self.catalog.first if name is None else self.catalog.served.get(name)
        if served is None:
            known = ", ".join(self.catalog.served) or "none, only masks are filled here"
            raise schemas.not_found(f"no such classifier; classifiers: {known}")
        return served

    # Answers -------------------------------------------------------------------------------------

    async def predict(self, request: PredictRequest) -> Any:
        """Label texts: for each its labels with their scores, the likeliest first.

        Raises:
            Refused: it can't be answered.
        """
        is_single = isinstance(request.inputs, str)
        texts = self.check_texts(request.inputs)
        if request.explain:
            responses.check_explain(self.config, texts)
        with self.refusing():
            async with asyncio.timeout(self.config.timeout_s):
                logits, served = await self.score(texts, request.model, request.truncate)
                found = responses.ranked(logits, served, request)
                if request.explain:
                    with self._aside.turn() as turn:
                        found = await responses.explained(texts, logits, found, served, turn)
        return found[0] if is_single else found

    async def score(self, texts: Sequence[str], name: str | None, truncate: bool | None) -> Scored:
        """Score texts with the named model, or the canary in its place.

        Raises:
            Refused: there is no such model, or there are too many tokens.
            Overloaded: too much waits already.
            Failed: the model failed.
        """
        loop = asyncio.get_running_loop()
        served, begun = self.find(name), loop.time()
        windows = self.config.long_texts == "windows" if truncate is None else not truncate
        expected = self._expected(served, texts, windows)
        served.batcher.check(expected)
        with served.batcher.expecting(expected):
            rows, counts = await self._encode(served, texts, windows)
        scored, canary = Scored(await served.score(rows, counts), served), self.catalog.canary
        if canary is not None and name is None and self._trial.draws():
            left = self.config.timeout_s - (loop.time() - begun)

            async def ask() -> npt.NDArray[np.float32]:
                return await canary.score(*await self._encode(canary, texts, windows))

            scored = await self._trial.ask(scored, canary, ask, left)
        self.metrics.add("texts_total", len(texts), model=scored.served.name)
        return scored

    def _expected(self, served: LoadedModel, texts: Sequence[str], windows: bool) -> int:
        """The tokens that texts will have, as far as their characters tell.

        Those that are cut have no more than the model reads, however long they are.
        """
        rate = self._tokens_a_character
        if windows:
            return int(sum(map(len, texts)) * rate)
        longest = served.classifier.longest
        return int(sum(min(len(text) * rate, longest) for text in texts))

    async def _encode(
        self, served: LoadedModel, texts: Sequence[str], windows: bool
    ) -> tuple[list[Row], list[int]]:
        characters = sum(map(len, texts))
        if self._characters and self._characters + characters > _MOST_CHARACTERS:
            raise Overloaded(1.0)
        self._characters += characters
        work = functools.partial(served.encode, texts, windows=windows)
        try:
            rows, counts = await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)
        except Exception as error:
            self._log.error("a text can't be tokenized: %s", type(error).__name__)
            raise schemas.unreadable("a text can't be turned into tokens") from None
        finally:
            self._characters -= characters
        lengths = [len(row) for row in rows]
        tokens = sum(lengths)
        if windows or max(lengths) < served.classifier.longest:  # else characters were left out
            self._tokens_a_character += _MEMORY * (tokens / characters - self._tokens_a_character)
        if tokens > self.config.max_tokens:
            raise schemas.too_large(
                f"{tokens:,} tokens are more than the {self.config.max_tokens:,} that are read in "
                "a request; send fewer or shorter texts, or truncate=true"
            )
        return rows, counts

    async def fill_mask(self, request: FillMaskRequest) -> Any:
        """Fill masks: for each mask of a text its likeliest tokens; a list of that for a list.

        Raises:
            Refused: it can't be answered.
        """
        model = self.catalog.filler
        if model is None:
            raise schemas.not_found("no model that fills masks is served here (serve.fill_mask)")
        texts = self.check_texts(request.inputs)
        with self.refusing():
            async with asyncio.timeout(self.config.timeout_s):
                with self._aside.turn() as turn:
                    found = await mask_requests.fill(model, texts, request.top_k, turn)
        return found[0] if isinstance(request.inputs, str) else found

    def check_texts(self, inputs: str | Sequence[str]) -> Sequence[str]:
        """The texts of a request, none of them empty."""
        texts = [inputs] if isinstance(inputs, str) else inputs
        if not texts:
            raise schemas.empty("inputs")
        if len(texts) > self.config.max_texts:
            raise schemas.too_large(
                f"{len(texts):,} texts are more than the {self.config.max_texts:,} that are read "
                "in a request"
            )
        for number, text in enumerate(texts):
            if not text.strip():
                raise schemas.empty("inputs" if len(texts) == 1 else f"inputs.{number}")
        return texts

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Turn what may go wrong into refusals."""
        try:
            yield
        except Overloaded as error:
            raise schemas.overloaded(error.wait_s) from None
        except TimeoutError:
            raise schemas.timed_out(self.config.timeout_s) from None
        except DataError as error:  # of a text with masks
            raise schemas.unreadable(str(error)) from None
        except Failed as error:
            self._log.error("%s", error, exc_info=error.__cause__)
            raise schemas.failed() from None
