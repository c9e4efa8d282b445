"""A server that answers by the contract of `raybert serve`, and misbehaves when it is told to.

Real HTTP and real models, of some thousand weights. A word's weight is what the decision loses
without the word: its weights sum to the decision only roughly, and `error` says how roughly.
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
from raybert.pipeline.predict_stage import fill_mask

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
        self.key = None  # what requests must bring, where there is one
        self.asked = []  # the bodies of all requests for predictions, refused ones included
        self._refusals, self._held, self._events = [], {}, []

    def refuse(self, status, error="no", *, after=0, **headers):
        """Answer the next request for a prediction with an error, or a later one."""
        self._refusals += [None] * after + [(status, error, headers)]

    def hold(self, *, explain=False):
        """Keep the next answer, or explanation, back until the event that this returns is set."""
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
        async def told(request, error):
            body = {"error": error.detail, "error_type": "refused"}
            return JSONResponse(body, error.status_code, headers=error.headers)

        return app

    async def _admit(self, request: Request):
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            raise HTTPException(401, "a key, please")
        if request.method == "POST":
            refusal = self._refusals.pop(0) if self._refusals else None
            self.asked.append(await request.json())
            if refusal is not None:
                status, error, headers = refusal
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
            for guesses in fill_mask(self.masked, asked.inputs, asked.top_k)
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
