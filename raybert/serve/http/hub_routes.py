"""`POST /`, as `huggingface_hub.InferenceClient` sends it to an endpoint, and its `parameters`.

The client knows one address, and reads the answers of transformers' pipelines: a list of labels for
each text, also of a single one; entities and predictions of a mask with their words. `/predict` and
`/fill-mask` answer in that form, too, where a request has `parameters`, which only this client
sends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from fastapi import FastAPI, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from raybert.inference.classifier import Text
from raybert.serve import request_errors
from raybert.serve.http.json_route import ClosedModel, RequestBody, Texts, check_texts, is_single
from raybert.serve.http.middleware import TEXT_COUNT
from raybert.serve.http.openapi import example
from raybert.serve.runtime.service import Scored, Service
from raybert.tasks.protocol import ALL_SCORES, AnswerOptions

_TOP_K = 5  # predictions of a mask, as transformers has it
_EXAMPLE = example(
    request={
        "inputs": "The plot was thin, but the actors made it a joy to watch.",
        "parameters": {"top_k": 1},
    },
    response=[[{"label": "pos", "score": 0.91}]],
)


class HubParameters(ClosedModel):
    """The parameters of transformers' pipelines that the client documents."""

    top_k: int | None = Field(None, ge=1, le=100, description="at most so many labels or tokens")
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = Field(
        None, description="of the scores of labels; null: what the task answers with"
    )
    truncation: bool | None = Field(None, description="as `truncate` of PredictRequest")
    targets: list[str] | None = Field(
        None, min_length=1, max_length=100, description="the only words to fill masks with"
    )
    aggregation_strategy: Literal["simple", "first", "average", "max"] | None = Field(
        None, description="of entities: they are read as with `first`"
    )
    ignore_labels: list[str] | None = Field(None, description="entities to leave out")
    stride: int | None = Field(None, description="accepted and ignored")


class HubRequest(RequestBody):
    """A request of `huggingface_hub.InferenceClient`."""

    inputs: Texts
    parameters: HubParameters | None = None


def add_hub_routes(app: FastAPI, service: Service) -> None:
    """Add the route."""

    @app.post(
        "/",
        response_model=list[Any],
        summary="Predict texts or masked words, for huggingface_hub's client",
        **_EXAMPLE,
    )
    async def infer(body: HubRequest, request: Request) -> Response:
        parameters = body.parameters or HubParameters()
        models = service.models
        filler = models.mask_filler
        given = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        # Masks are filled where there is one in every text, as the client's method needs it.
        has_masks = filler is not None and all(
            isinstance(text, str) and filler.mask_token in text for text in given
        )
        if models.default is None or (given and has_masks):
            texts = [str(text) for text in check_texts(body.inputs, service.config.max_texts)]
            request.scope[TEXT_COUNT] = len(texts)
            async with asyncio.timeout(service.config.timeout_s):
                found = await fill_masks(service, texts, parameters)
            return JSONResponse(found[0] if isinstance(body.inputs, str) else found)
        pairs = models.default.classifier.reads_pairs
        chosen = check_texts(body.inputs, service.config.max_texts, pairs=pairs)
        request.scope[TEXT_COUNT] = len(chosen)
        async with asyncio.timeout(service.config.timeout_s):
            scored = await service.score(chosen, None, parameters.truncation)
            single = is_single(body.inputs, pairs=pairs)
            return JSONResponse(await answer(service, chosen, scored, parameters, single=single))


async def answer(
    service: Service,
    texts: Sequence[Text],
    scored: Scored,
    parameters: HubParameters,
    options: AnswerOptions = ALL_SCORES,
    *,
    single: bool,
) -> list[Any]:
    """Answer texts as transformers' pipelines do; `parameters` come before `options`.

    Of a `single` text entities are a list, and labels a list in a list.
    """
    function, top_k = parameters.function_to_apply, parameters.top_k or options.top_k
    if function is not None:
        options = replace(options, raw_scores=True, all_scores=True, threshold=None)
    # The function is applied to all scores.
    options = replace(options, top_k=top_k if function is None else None)
    answers = await service.answer(texts, scored, options)
    if not scored.model.classifier.task.is_per_token:
        return [_apply(each, function)[: None if function is None else top_k] for each in answers]
    ignored = set(parameters.ignore_labels or ())
    entities = [
        [
            {**each, "word": str(text)[each["start"] : each["end"]]}
            for each in answer
            if each["entity_group"] not in ignored
        ]
        for text, answer in zip(texts, answers, strict=True)
    ]
    return entities[0] if single else entities


def _apply(answer: list[dict[str, Any]], function: str | None) -> list[dict[str, Any]]:
    """An answer with a function of its raw scores."""
    if function in (None, "none"):
        return answer
    raw = np.array([each["score"] for each in answer], np.float64)
    if function == "sigmoid":
        values = 1 / (1 + np.exp(-raw))
    else:
        values = np.exp(raw - raw.max())
        values /= values.sum()
    return [
        {**each, "score": round(float(value), 6)}
        for each, value in zip(answer, values, strict=True)
    ]


async def fill_masks(
    service: Service, texts: Sequence[str], parameters: HubParameters
) -> list[Any]:
    """Fill masks as transformers' pipeline does: predictions of each mask, of one mask unnested."""
    top_k = parameters.top_k or _TOP_K
    filler = service.models.mask_filler
    filled = await service.fill_masks(texts, top_k, parameters.targets)
    if filler is None:
        raise request_errors.not_found("no model that fills masks is served here")
    answers = [
        [
            [
                {"score": one["probability"], **filler.describe(text, index, one["token"])}
                for one in mask
            ]
            for index, mask in enumerate(masks)
        ]
        for text, masks in zip(texts, filled, strict=True)
    ]
    return [masks[0] if len(masks) == 1 else masks for masks in answers]
