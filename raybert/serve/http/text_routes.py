"""POST /predict and POST /fill-mask, in text-embeddings-inference's form: bodies and routes."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import numpy as np
from fastapi import FastAPI, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from raybert.serve import request_errors
from raybert.serve.http.json_route import RequestBody, Texts, check_texts
from raybert.serve.http.middleware import TEXT_COUNT
from raybert.serve.http.openapi import example
from raybert.serve.runtime.service import Scored, Service

_MAX_EXPLAINED = 8  # texts of a request

_PREDICT_EXAMPLE = example(
    request={"inputs": "The plot was thin, but the actors made it a joy to watch."},
    response=[{"label": "pos", "score": 0.91}, {"label": "neg", "score": 0.09}],
)
_FILL_MASK_EXAMPLE = example(
    request={"inputs": "I liked this [MASK].", "top_k": 1},
    response=[[{"token_str": "movie", "score": 0.5}]],
)


class PredictRequest(RequestBody):
    """Texts to classify."""

    inputs: Texts
    truncate: bool | None = Field(
        None,
        description="true: a text past the model's length loses its middle, as in training; false: "
        "it is read in windows whose scores are averaged; null: as the server is configured",
    )
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = Field(
        None,
        description="accepted for text-embeddings-inference's clients and ignored: truncation "
        "removes the middle",
    )
    parameters: dict[str, Any] | None = Field(
        None, max_length=0, description="accepted, when empty, for huggingface_hub's client"
    )
    raw_scores: bool = Field(False, description="logits in place of probabilities")
    all_scores: bool = Field(
        True, description="all labels, the most probable first; false: only the first"
    )
    explain: bool = Field(False, description="add a weight for each word")
    model: str | None = Field(
        None, description="name of the model, where several are served; null: the first"
    )


class FillMaskRequest(RequestBody):
    """Texts with masks to fill."""

    inputs: Texts
    top_k: int = Field(5, ge=1, le=100, description="predictions for each mask")


class Score(BaseModel):
    """A label with its probability."""

    label: str
    score: float


class WordWeight(BaseModel):
    """A word, its position in the text in characters, and its weight."""

    text: str
    start: int
    end: int
    weight: float = Field(description="positive: it supports the most probable label")


class Explained(BaseModel):
    """Scores with the weights of words."""

    predictions: list[Score] = Field(description="the most probable first")
    words: list[WordWeight] = Field(description="in the order of the text")
    error: float = Field(
        description="completeness error: |sum of the words' weights - (margin of the text - margin "
        "with all words masked)|; margin: the label's logit minus the mean of the other logits"
    )


class TokenScore(BaseModel):
    """A token with its probability in place of a mask."""

    token_str: str
    score: float


def add_text_routes(app: FastAPI, service: Service) -> None:
    """Add the routes; they return a Response, so that FastAPI does not validate it again."""
    config = service.config

    @app.post(
        "/predict",
        response_model=list[Score] | list[list[Score]] | Explained | list[Explained],
        summary="Classify texts",
        **_PREDICT_EXAMPLE,
    )
    async def predict(body: PredictRequest, request: Request) -> Response:
        texts = check_texts(body.inputs, config.max_texts)
        request.scope[TEXT_COUNT] = len(texts)
        if body.explain and not config.explain:
            raise request_errors.invalid("explain: this server does not explain (serve.explain)")
        if body.explain and len(texts) > _MAX_EXPLAINED:
            raise request_errors.too_large(
                f"{len(texts)} texts are more than the {_MAX_EXPLAINED} that are explained in a "
                "request"
            )
        async with asyncio.timeout(config.timeout_s):
            scored = await service.score(texts, body.model, body.truncate)
            answers: list[Any] = _rank(scored, body)
            if body.explain:
                explanations = await service.explain(texts, scored)
                answers = [
                    {"predictions": scores, "words": list(map(vars, one.words)), "error": one.error}
                    for scores, one in zip(answers, explanations, strict=True)
                ]
        return JSONResponse(answers[0] if isinstance(body.inputs, str) else answers)

    @app.post(
        "/fill-mask",
        response_model=list[list[TokenScore]] | list[list[list[TokenScore]]],
        summary="Predict masked words",
        **_FILL_MASK_EXAMPLE,
    )
    async def fill_mask(body: FillMaskRequest, request: Request) -> Response:
        texts = check_texts(body.inputs, config.max_texts)
        request.scope[TEXT_COUNT] = len(texts)
        async with asyncio.timeout(config.timeout_s):
            filled = await service.fill_masks(texts, body.top_k)
        answers = [
            [
                [{"token_str": one["token"], "score": one["probability"]} for one in mask]
                for mask in masks
            ]
            for masks in filled
        ]
        return JSONResponse(answers[0] if isinstance(body.inputs, str) else answers)


def _rank(scored: Scored, body: PredictRequest) -> list[list[dict[str, Any]]]:
    """Return each text's labels with their scores, the most probable first."""
    logits, model = scored
    scores = logits if body.raw_scores else model.classifier.calibrated(logits)
    count = None if body.all_scores else 1
    return [
        [
            {"label": model.labels[i], "score": round(float(row[i]), 6)}
            for i in np.argsort(-row, kind="stable")[:count]
        ]
        for row in scores
    ]
