"""The Open Inference Protocol, version 2: texts as BYTES in, labels and scores as tensors out."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from raybert.serve.http import schemas
from raybert.serve.http.schemas import InferRequest
from raybert.serve.runtime.loaded_model import LoadedModel
from raybert.serve.runtime.service import Service

INPUT = {"name": "text", "datatype": "BYTES", "shape": [-1]}


def describe(served: LoadedModel) -> dict[str, Any]:
    """A model's metadata."""
    return {
        "name": served.name,
        "versions": [served.version],
        "platform": "raybert_pytorch",
        "inputs": [INPUT],
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
            {"name": "scores", "datatype": "FP32", "shape": [-1, len(served.labels)]},
        ],
        "parameters": {"labels": served.labels},
    }


def find(service: Service, name: str, version: str | None) -> LoadedModel:
    """A model by name, and by the version that a path may ask for.

    Raises:
        Refused: there is none.
    """
    served = service.find(name)
    if version is not None and version != served.version:
        raise schemas.not_found(f"no such version of {name}; version {served.version} is served")
    return served


async def infer(
    service: Service, name: str, version: str | None, request: InferRequest
) -> dict[str, Any]:
    """Label the texts of a request.

    Returns:
        Outputs `label` [n], the likeliest one, and `scores` [n, labels], calibrated probabilities
        in the order of the metadata's labels; or those of them that were asked for.

    Raises:
        Refused: it can't be answered.
    """
    find(service, name, version)
    texts = _texts(request)
    truncate = (request.parameters or {}).get("truncate")
    if not (truncate is None or isinstance(truncate, bool)):
        raise schemas.invalid("parameters.truncate: true or false")
    wanted = [output.name for output in request.outputs or []] or ["label", "scores"]
    for output in wanted:
        if output not in ("label", "scores"):
            raise schemas.invalid("outputs: known are label, scores")
    checked = service.check_texts(texts)
    with service.refusing():
        async with asyncio.timeout(service.config.timeout_s):
            # Named, so that no canary answers: whoever asks for a model gets that one.
            logits, served = await service.score(checked, name, truncate)
    scores = served.classifier.calibrated(logits)
    best = scores.argmax(axis=1)
    outputs = {
        "label": {
            "name": "label",
            "datatype": "BYTES",
            "shape": [len(texts)],
            "data": [served.labels[i] for i in best],
        },
        "scores": {
            "name": "scores",
            "datatype": "FP32",
            "shape": list(scores.shape),
            "data": [round(float(score), 6) for score in scores.ravel()],
        },
    }
    answer: dict[str, Any] = {"model_name": served.name, "model_version": served.version}
    if request.id is not None:
        answer["id"] = request.id
    return {**answer, "outputs": [outputs[name] for name in wanted]}


def _texts(request: InferRequest) -> list[str]:
    if not request.inputs:
        raise schemas.invalid("inputs: this model has one, text; got none")
    [given] = request.inputs
    if any(size < 0 for size in given.shape) or math.prod(given.shape) != len(given.data):
        raise schemas.invalid(f"inputs.0.shape: does not fit {len(given.data):,} texts")
    return given.data
