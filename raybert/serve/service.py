"""What a replica does with a request, apart from HTTP and apart from Ray.

Tokenization runs in one thread, models in another, explanations and masks in a third: the event
loop only passes things on.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from raybert import __version__
from raybert.errors import DataError
from raybert.serve import bodies
from raybert.serve.batcher import Aside, Failed, Overloaded, Row
from raybert.serve.bodies import FillMaskRequest, PredictRequest, Refused
from raybert.serve.catalog import Catalog
from raybert.serve.explain import Explanation
from raybert.serve.metrics import Metrics
from raybert.serve.models import Served
from raybert.serve.settings import ServeConfig

_ASIDE = 8  # explanations and masks that may wait
_MOST_EXPLAINED = 8  # texts of a request
_MOST_CHARACTERS = 8 << 20  # that wait to be tokenized: about a second of it
_MEMORY = 0.05  # weight of the newest request in the tokens that are expected of a text
_STUCK_S = 120  # of one batch, after which a replica is no good any more


class Scored(NamedTuple):
    """The scores of a request's texts, and the model that gave them."""

    logits: npt.NDArray[np.float32]  # [texts, labels]
    served: Served


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
        use_threads = functools.partial(_use_threads, threads)
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")
        self._computing = ThreadPoolExecutor(1, "compute", use_threads)
        self._beside = ThreadPoolExecutor(1, "beside", use_threads)
        self._aside = Aside(self._beside, _ASIDE)
        self._characters = 0  # that wait to be tokenized
        self._tokens_a_character = 0.2  # of the last requests, after cutting
        self._threads = threads
        self.catalog = Catalog(config, self._computing, self.metrics, self._log, device)

    def load(self) -> None:
        """Load the models; takes seconds, or longer where a precision is chosen by measuring.

        Raises:
            UserError: a model is not there, or is none of its kind.
            DamagedError: a file is cut short or altered.
        """
        _use_threads(self._threads)
        self.catalog.load()

    def close(self) -> None:
        """Let the threads end."""
        for executor in (self._tokenizing, self._computing, self._beside):
            executor.shutdown(wait=False, cancel_futures=True)

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
        """Refuse a request before it is read, where the queue that it will want is full.

        Raises:
            Refused: 429.
        """
        if len(self.catalog.served) != 1:  # which queue only the request says
            return
        [served] = self.catalog.served.values()
        try:
            served.batcher.check()
        except Overloaded as error:
            raise bodies.overloaded(error.wait_s) from None

    @property
    def gauges(self) -> dict[str, float]:
        """What is true at this moment, for the metrics."""
        return {"queued_tokens": sum(served.batcher.queued for served in self.catalog.all())}

    def info(self) -> dict[str, Any]:
        """What is served, with the keys of text-embeddings-inference where it has them."""
        config, catalog = self.config, self.catalog
        first, filler, canary = catalog.first, catalog.filler, catalog.canary
        labels = first.labels if first else []
        found: dict[str, Any] = {
            "model_id": first.name if first else catalog.filler_name,
            "labels": labels,
            "max_input_length": first.classifier.longest if first else filler and filler.longest,
            "mask_token": filler and filler.mask_token,
            "explain": config.explain and first is not None,
            "long_texts": config.long_texts,
            "max_client_batch_size": config.max_texts,
            "models": [{"name": s.name, "version": s.version} for s in catalog.served.values()],
            "version": __version__,
        }
        if first:
            found |= {
                "model_sha": first.weights,
                "model_dtype": first.classifier.precision,
                "model_type": {
                    "classifier": {
                        "id2label": {str(i): label for i, label in enumerate(labels)},
                        "label2id": {label: i for i, label in enumerate(labels)},
                    }
                },
                "temperature": first.classifier.temperature,
                "max_batch_tokens": first.classifier.tokens_per_batch,
            }
        if canary and config.canary:
            share = config.canary.share
            found["canary"] = {"name": canary.name, "version": canary.version, "share": share}
        return found

    def find(self, name: str | None) -> Served:
        """A classifier by name; None: the first.

        Raises:
            Refused: there is none.
        """
        served = self.catalog.first if name is None else self.catalog.served.get(name)
        if served is None:
            known = ", ".join(self.catalog.served) or "none, only masks are filled here"
            raise bodies.not_found(f"no such classifier; classifiers: {known}")
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
            self._check_explain(texts)
        with self.refusing():
            async with asyncio.timeout(self.config.timeout_s):
                logits, served = await self.score(texts, request.model, request.truncate)
                answers = _ranked(logits, served, request)
                if request.explain:
                    answers = await self._explained(texts, logits, answers, served)
        return answers[0] if is_single else answers

    async def score(self, texts: Sequence[str], name: str | None, truncate: bool | None) -> Scored:
        """Score texts with the named model, or the canary in its place.

        Raises:
            Refused: there is no such model, or there are too many tokens.
            Overloaded: too much waits already.
            Failed: the model failed.
        """
        served = self.find(name)
        windows = self.config.long_texts == "windows" if truncate is None else not truncate
        expected = int(sum(map(len, texts)) * self._tokens_a_character)
        served.batcher.check(expected)
        with served.batcher.expecting(expected):
            rows, counts = await self._encode(served, texts, windows)
        canary = self.catalog.canary
        share = self.config.canary.share if self.config.canary else 0.0
        if canary is None or name is not None or random.random() >= share:
            self.metrics.add("texts_total", len(texts), model=served.name)
            return Scored(await served.score(rows, counts), served)
        mine = await served.score(rows, counts)
        try:
            theirs = await canary.score(*await self._encode(canary, texts, windows))
        except (Overloaded, Failed, Refused) as error:  # what is on trial must not cost an answer
            self._log.error("the canary failed: %s", error)
            return Scored(mine, served)
        self._compare(Scored(mine, served), Scored(theirs, canary))
        self.metrics.add("texts_total", len(texts), model=canary.name)
        return Scored(theirs, canary)

    async def _encode(
        self, served: Served, texts: Sequence[str], windows: bool
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
            raise bodies.unreadable("a text can't be turned into tokens") from None
        finally:
            self._characters -= characters
        tokens = sum(map(len, rows))
        self._tokens_a_character += _MEMORY * (tokens / characters - self._tokens_a_character)
        if tokens > self.config.max_tokens:
            raise bodies.too_large(
                f"{tokens:,} tokens are more than the {self.config.max_tokens:,} that are read in "
                "a request; send fewer or shorter texts, or truncate=true"
            )
        return rows, counts

    def _compare(self, old: Scored, new: Scored) -> None:
        """Count whether both models give the same label, and how far its scores differ."""
        before, after = (s.served.classifier.calibrated(s.logits) for s in (old, new))
        for mine, theirs in zip(before, after, strict=True):
            label = old.served.labels[int(mine.argmax())]
            agree = label == new.served.labels[int(theirs.argmax())]
            named = dict(zip(new.served.labels, theirs.tolist(), strict=True))
            difference = abs(float(mine.max()) - named.get(label, 0.0))
            self.metrics.add("canary_total", model=new.served.name, agree=str(agree).lower())
            self.metrics.add("canary_difference_total", difference, model=new.served.name)

    async def _explained(
        self,
        texts: Sequence[str],
        logits: npt.NDArray[np.float32],
        answers: Sequence[Any],
        served: Served,
    ) -> list[Any]:
        found = []
        for text, label, scores in zip(texts, logits.argmax(axis=1).tolist(), answers, strict=True):
            # The explainer is made in the thread that uses it, at its first text.
            explanation = await self._aside.run(functools.partial(_explain, served, text, label))
            words = [vars(word) for word in explanation.words]
            found.append({"predictions": scores, "words": words, "error": explanation.error})
        return found

    def _check_explain(self, texts: Sequence[str]) -> None:
        if not self.config.explain:
            raise bodies.invalid("explain: this server does not explain (serve.explain)")
        if len(texts) > _MOST_EXPLAINED:
            raise bodies.too_large(
                f"{len(texts)} texts are more than the {_MOST_EXPLAINED} that are explained in a "
                "request"
            )

    async def fill_mask(self, request: FillMaskRequest) -> Any:
        """Fill masks: for each mask of a text its likeliest tokens; a list of that for a list.

        Raises:
            Refused: it can't be answered.
        """
        filler = self.catalog.filler
        if filler is None:
            raise bodies.not_found("no model that fills masks is served here (serve.fill_mask)")
        texts = self.check_texts(request.inputs)
        with self.refusing():
            async with asyncio.timeout(self.config.timeout_s):
                work = [functools.partial(filler.fill, text, request.top_k) for text in texts]
                filled = await self._aside.run(lambda: [fill() for fill in work])
            guesses = (guess for text in filled for mask in text for guess in mask)
            if not all(math.isfinite(guess["probability"]) for guess in guesses):
                raise Failed(ValueError("scores are not finite: the weights have diverged"))
        answers = [
            [
                [{"token_str": guess["token"], "score": guess["probability"]} for guess in mask]
                for mask in text
            ]
            for text in filled
        ]
        return answers[0] if isinstance(request.inputs, str) else answers

    def check_texts(self, inputs: str | Sequence[str]) -> Sequence[str]:
        """The texts of a request, none of them empty."""
        texts = [inputs] if isinstance(inputs, str) else inputs
        if not texts:
            raise bodies.empty("inputs")
        if len(texts) > self.config.max_texts:
            raise bodies.too_large(
                f"{len(texts):,} texts are more than the {self.config.max_texts:,} that are read "
                "in a request"
            )
        for number, text in enumerate(texts):
            if not text.strip():
                raise bodies.empty("inputs" if len(texts) == 1 else f"inputs.{number}")
        return texts

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Turn what may go wrong into refusals."""
        try:
            yield
        except Overloaded as error:
            raise bodies.overloaded(error.wait_s) from None
        except TimeoutError:
            raise bodies.timed_out(self.config.timeout_s) from None
        except DataError as error:  # of a text with masks
            raise bodies.unreadable(str(error)) from None
        except Failed as error:
            self._log.error("%s", error, exc_info=error.__cause__)
            raise bodies.failed() from None


def _explain(served: Served, text: str, label: int) -> Explanation:
    return served.explainer.explain(text, label)


def _use_threads(threads: int | None) -> None:
    """Make models compute with so many threads, when they are called from this one."""
    if threads is not None:
        torch.set_num_threads(threads)


def _ranked(logits: npt.NDArray[np.float32], served: Served, request: PredictRequest) -> list[Any]:
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
