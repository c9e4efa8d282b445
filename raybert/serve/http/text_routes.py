"""POST /predict and POST /fill-mask, in text-embeddings-inference's form: bodies and routes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Literal, Union

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from raybert.serve import request_errors
from raybert.serve.http import hub_routes
from raybert.serve.http.hub_routes import HubParameters
from raybert.serve.http.json_route import RequestBody, Texts, check_texts, is_single
from raybert.serve.http.middleware import TEXT_COUNT
from raybert.serve.http.openapi import example
from raybert.serve.runtime.service import Service
from raybert.tasks.protocol import TRUNCATED, AnswerOptions
from raybert.tasks.registry import TASKS

_MAX_EXPLAINED = 8  # texts of a request
if TYPE_CHECKING:
    Answer = list[Any]
else:  # for a text, of any task
    Answer = Union[*(list[task.answer_schema()] for task in TASKS.values())]

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
    parameters: HubParameters | None = Field(
        None, description="of huggingface_hub's client, which is answered as its methods read it"
    )
    raw_scores: bool = Field(False, description="logits in place of probabilities")
    all_scores: bool = Field(
        True,
        description="all labels, the most probable first; false: only the predicted ones",
    )
    top_k: int | None = Field(None, ge=1, description="at most so many labels or entities")
    threshold: float | None = Field(
        None, description="leave out labels and entities with a lower score"
    )
    explain: bool = Field(False, description="add a weight for each word")
    model: str | None = Field(
        None, description="name of the model, where several are served; null: the first"
    )


class FillMaskRequest(RequestBody):
    """Texts with masks to fill."""

    inputs: Texts
    top_k: int = Field(5, ge=1, le=100, description="predictions for each mask")
    parameters: HubParameters | None = Field(
        None, description="of huggingface_hub's client, which is answered as its methods read it"
    )


class WordWeight(BaseModel):
    """A word, its position in the text in characters, and its weight."""

    text: str
    start: int
    end: int
    weight: float = Field(description="positive: it supports the explained label")
    input: int = Field(description="of a pair: 0 for a word of the first text, 1 of the second")


class Explained(BaseModel):
    """An answer with the weights of words."""

    predictions: Answer = Field(description="as without `explain`")
    label: str = Field(description="what the weights support: the most probable label, as a rule")
    words: list[WordWeight] = Field(description="in the order of the text")
    error: float = Field(
        description="completeness error: |sum of the words' weights - (margin of the text - margin "
        "with all words masked)|; margin: the label's logit minus the mean of the other logits"
    )
    truncated: bool | None = TRUNCATED


class TokenScore(BaseModel):
    """A token with its probability in place of a mask."""

    token_str: str
    score: float


def add_text_routes(app: FastAPI, service: Service) -> None:
    """Add the routes; they return a Response, so that FastAPI does not validate it again."""
    config = service.config

    @app.post(
        "/predict",
        response_model=Answer | list[Answer] | Explained | list[Explained],
        summary="Predict texts, or pairs of texts",
        **_PREDICT_EXAMPLE,
    )
    async def predict(body: PredictRequest, request: Request) -> Response:
        pairs = service.find(body.model).classifier.reads_pairs
        texts = check_texts(body.inputs, config.max_texts, pairs=pairs)
        request.scope[TEXT_COUNT] = len(texts)
        if body.explain and not config.explain:
            raise request_errors.invalid("explain: this server does not explain (serve.explain)")
        if body.explain and len(texts) > _MAX_EXPLAINED:
            raise request_errors.too_large(
                f"{len(texts)} texts are more than the {_MAX_EXPLAINED} that are explained in a "
                "request"
            )
        async with asyncio.timeout(config.timeout_s):
            truncate, parameters = body.truncate, body.parameters
            if truncate is None and parameters is not None:
                truncate = parameters.truncation
            scored = await service.score(texts, body.model, truncate)
            options = AnswerOptions(body.raw_scores, body.all_scores, body.top_k, body.threshold)
            if parameters is not None and not body.explain:
                single = is_single(body.inputs, pairs=pairs)
                given = (service, texts, scored, parameters, options)
                return JSONResponse(await hub_routes.answer(*given, single=single))
            answers = await service.answer(texts, scored, options)
            if body.explain:
                explanations = await service.explain(texts, scored)
                answers = [
                    {
                        "predictions": answer,
                        "label": one.label,
                        "words": list(map(vars, one.words)),
                        "error": one.error,
                        **({"truncated": True} if is_cut else {}),
                    }
                    for answer, one, is_cut in zip(
                        answers, explanations, scored.is_cut, strict=True
                    )
                ]
        return JSONResponse(answers[0] if is_single(body.inputs, pairs=pairs) else answers)

    @app.post(
        "/fill-mask",
        response_model=list[list[TokenScore]] | list[list[list[TokenScore]]],
        summary="Predict masked words",
        **_FILL_MASK_EXAMPLE,
    )
    async def fill_mask(body: FillMaskRequest, request: Request) -> Response:
        texts = [str(text) for text in check_texts(body.inputs, config.max_texts)]
        request.scope[TEXT_COUNT] = len(texts)
        async with asyncio.timeout(config.timeout_s):
            if body.parameters is not None:
                found = await hub_routes.fill_masks(service, texts, body.parameters)
                return JSONResponse(found[0] if isinstance(body.inputs, str) else found)
            filled = await service.fill_masks(texts, body.top_k)
        answers = [
            [
                [{"token_str": one["token"], "score": one["probability"]} for one in mask]
                for mask in masks
            ]
            for masks in filled
        ]
        return JSONResponse(answers[0] if isinstance(body.inputs, str) else answers)
