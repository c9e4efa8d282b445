"""Triton's extensions of the Open Inference Protocol: configuration, statistics, repository.

Models are loaded and unloaded by `raybert promote` and the configuration only.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request

from raybert.serve.http.open_inference import find_version
from raybert.serve.http.openapi import error_responses
from raybert.serve.request_errors import RequestError
from raybert.serve.runtime.loaded_models import LoadedModel
from raybert.serve.runtime.service import Service

_MODEL = "/v2/models/{name}"
_VERSION = _MODEL + "/versions/{version}"
_TYPES = {"BYTES": "TYPE_STRING", "FP32": "TYPE_FP32", "BOOL": "TYPE_BOOL"}
_PARTS = ("queue", "compute_input", "compute_output", "cache_hit", "cache_miss")  # not measured


def add_triton_routes(app: FastAPI, service: Service) -> None:
    """Add the routes."""
    responses = error_responses(401, 404)

    @app.get(f"{_VERSION}/config", include_in_schema=False)
    @app.get(f"{_MODEL}/config", responses=responses, summary="A model's configuration")
    async def config(name: str, request: Request) -> dict[str, Any]:
        version = request.path_params.get("version")
        return _configuration(find_version(service, name, version))

    @app.get("/v2/models/stats", responses=responses, summary="Statistics of all models")
    async def all_statistics() -> dict[str, Any]:
        models = service.models.classifiers.values()
        return {"model_stats": [_statistics(service, model) for model in models]}

    @app.get(f"{_VERSION}/stats", include_in_schema=False)
    @app.get(f"{_MODEL}/stats", responses=responses, summary="Statistics of a model")
    async def statistics(name: str, request: Request) -> dict[str, Any]:
        version = request.path_params.get("version")
        return {"model_stats": [_statistics(service, find_version(service, name, version))]}

    @app.post("/v2/repository/index", responses=responses, summary="The models that are served")
    async def index() -> list[dict[str, str]]:
        return [
            {"name": model.name, "version": model.version, "state": "READY", "reason": ""}
            for model in service.models.classifiers.values()
        ]

    @app.post("/v2/repository/models/{name}/{action}", include_in_schema=False)
    async def change(name: str, action: str) -> None:
        message = "models are loaded by `raybert promote` and the configuration, not by requests"
        raise RequestError(400, "Validation", message)


def _configuration(model: LoadedModel) -> dict[str, Any]:
    """The fields of Triton's ModelConfig that a client needs to make a request."""
    classifier = model.classifier
    return {
        "name": model.name,
        "platform": "raybert_pytorch",
        "backend": "raybert",
        "max_batch_size": 0,  # the first dimension is the number of texts
        "input": [
            {
                "name": "text",
                "data_type": _TYPES["BYTES"],
                "dims": [-1, 2] if classifier.reads_pairs else [-1],
            }
        ],
        "output": [
            {
                "name": tensor.name,
                "data_type": _TYPES[tensor.datatype],
                "dims": list(tensor.shape),
            }
            for tensor in classifier.task.tensors([], None)
        ],
        "parameters": {"labels": {"string_value": ",".join(model.labels)}},
    }


def _statistics(service: Service, model: LoadedModel) -> dict[str, Any]:
    """Counts of this replica, since it started."""
    count = {
        name: service.metrics.read(name, model=model.name)
        for name in ("texts_total", "batches_total", "batch_seconds_total")
    }
    computed = {
        "count": int(count["batches_total"]),
        "ns": int(1e9 * count["batch_seconds_total"]),
    }
    nothing = {"count": 0, "ns": 0}
    return {
        "name": model.name,
        "version": model.version,
        "last_inference": model.last_scored_ms,
        "inference_count": int(count["texts_total"]),
        "execution_count": int(count["batches_total"]),
        "inference_stats": {
            "success": computed,
            "fail": nothing,
            "compute_infer": computed,
            **dict.fromkeys(_PARTS, nothing),
        },
        "batch_stats": [],
    }
