"""A fake of `raybert serve` with the same HTTP interface, which fails on demand.

It uses HTTP and tiny models. A word's weight is the decrease of the decision without the word: the
sum of the weights differs from the decision by `error`.
"""

import re
import socket
import threading
import time
from pathlib import Path

import numpy as np
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel

import raybert.serve.http
from raybert.inference.classifier import TextClassifier
from raybert.inference.fill_mask import MaskFiller

PAGE = Path(raybert.serve.http.__file__).parent / "page"


class Predict(BaseModel):
    inputs: str | list[str]
    truncate: bool = False
    raw_scores: bool = False
    explain: bool = False


class FillMask(BaseModel):
    inputs: str
    top_k: int = 5


class Running:
    """An application behind HTTP, in a thread, for as long as the context lasts."""

    def __init__(self, app, lifespan="off"):
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._sock.getsockname()[1]}/"
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                ws="none",
                lifespan=lifespan,
                log_config=None,
                log_level="error",
                timeout_graceful_shutdown=1,
            )
        )

    def __enter__(self):
        run = {"sockets": [self._sock]}
        self._thread = threading.Thread(target=self._server.run, kwargs=run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        return self

    def __exit__(self, *rest):
        self._server.should_exit = True
        self._thread.join()


class StandIn:
    """The server, running in a thread for as long as the context lasts."""

    def __init__(self, classifier, masked):
        self.classifier, self.masked = TextClassifier(classifier), masked
        self.model_id, self.labels, self.mask_token = "tiny", self.classifier.labels, "[MASK]"
        self.explains = True
        self.key = None  # required in requests, unless None
        self.asked = []  # bodies of all requests for predictions, including rejected ones
        self._rejections, self._held, self._events = [], {}, []

    def reject(self, status, error="no", *, after=0, **headers):
        """Answer the next request for a prediction, or a later one, with an error."""
        self._rejections += [None] * after + [(status, error, headers)]

    def hold(self, *, explain=False):
        """Delay the next answer, or explanation, until the returned event is set."""
        self._held[explain] = threading.Event()
        self._events.append(self._held[explain])
        return self._held[explain]

    def __enter__(self):
        self._running = Running(self._app())
        self.url = self._running.url
        self._running.__enter__()
        return self

    def __exit__(self, *rest):
        for event in self._events:
            event.set()
        self._running.__exit__()

    def _app(self):
        app = FastAPI()
        api = APIRouter(dependencies=[Depends(self._admit)])
        api.get("/info")(self.info)
        api.post("/predict")(self.predict)
        api.post("/fill-mask")(self.fill)
        app.include_router(api)
        app.mount("/", StaticFiles(directory=PAGE, html=True))

        @app.exception_handler(HTTPException)
        async def error_response(request, error):
            body = {"error": error.detail, "error_type": "rejected"}
            return JSONResponse(body, error.status_code, headers=error.headers)

        return app

    async def _admit(self, request: Request):
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            raise HTTPException(401, "a key, please")
        if request.method == "POST":
            rejection = self._rejections.pop(0) if self._rejections else None
            self.asked.append(await request.json())
            if rejection is not None:
                status, error, headers = rejection
                raise HTTPException(status, error, headers)

    def info(self):
        return {
            "model_id": self.model_id,
            "labels": self.labels,
            "max_input_length": self.classifier.preprocessing.seq_len,
            "mask_token": self.mask_token,
            "explain": self.explains,
        }

    def predict(self, asked: Predict):
        held = self._held.pop(asked.explain, None)
        if held is not None:
            held.wait(60)
        texts = [asked.inputs] if isinstance(asked.inputs, str) else asked.inputs
        answers = [self._scores(row) for row in self.classifier.probabilities(texts)]
        if asked.explain:
            return {"predictions": answers[0], **self._explained(texts[0])}
        return answers[0] if isinstance(asked.inputs, str) else answers

    def fill(self, asked: FillMask):
        return [
            [{"token_str": one["token"], "score": one["probability"]} for one in guesses]
            for guesses in MaskFiller(self.masked).fill(asked.inputs, asked.top_k)
        ]

    def _scores(self, row):
        pairs = [{"label": n, "score": float(s)} for n, s in zip(self.labels, row, strict=True)]
        return sorted(pairs, key=lambda pair: -pair["score"])

    def _explained(self, text):
        spans = [found.span() for found in re.finditer(r"\S+", text)]
        without = [text[:start] + text[end:] for start, end in spans]
        logits = self.classifier.logits([text, "", *without])
        best = logits[0].argmax()
        others = np.delete(logits, best, axis=1)
        margins = logits[:, best] - np.log(np.exp(others).sum(1))
        weights = margins[0] - margins[2:]
        return {
            "words": [
                {"text": text[start:end], "start": start, "end": end, "weight": float(weight)}
                for (start, end), weight in zip(spans, weights, strict=True)
            ],
            "error": float(abs(margins[0] - margins[1] - weights.sum())),
        }
