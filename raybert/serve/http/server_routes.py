"""Routes about the server itself: health, /info, /metrics and /docs."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from starlette.responses import HTMLResponse, PlainTextResponse

from raybert import __version__
from raybert.serve.http.openapi import DOCS_HEADERS, error_responses, render_docs
from raybert.serve.request_errors import HEALTH_PATHS, LIVE_PATHS, READY_PATHS, RequestError
from raybert.serve.runtime.metrics import render
from raybert.serve.runtime.service import Service

#: Paths that need no key.
OPEN_PATHS = ("/docs", "/openapi.json", *HEALTH_PATHS)


async def _own_metrics(service: Service) -> str:
    return render([service.metrics.families()])


def add_server_routes(
    app: FastAPI, service: Service, metrics_of_all: Callable[[], Awaitable[str]] | None = None
) -> None:
    """Add the routes; `metrics_of_all` replicas, None: of this one."""
    read_metrics = metrics_of_all or functools.partial(_own_metrics, service)

    async def ready() -> dict[str, bool]:
        return check_ready(service)

    async def live() -> dict[str, bool]:
        return {"live": True}

    for path in READY_PATHS:
        app.get(path, responses=error_responses(503), summary="Whether the server is ready")(ready)
    for path in LIVE_PATHS:
        app.get(path, summary="Whether the server runs")(live)
    for path in (*READY_PATHS, *LIVE_PATHS):  # some load balancers send HEAD
        app.head(path, include_in_schema=False)(ready if path in READY_PATHS else live)

    @app.get("/info", responses=error_responses(401), summary="The models and limits")
    async def info() -> dict[str, Any]:
        return server_info(service)

    @app.get(
        "/metrics",
        responses=error_responses(401),
        response_class=PlainTextResponse,
        summary="Metrics for Prometheus",
    )
    async def metrics() -> str:
        return await read_metrics()

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(render_docs(app.openapi()), headers=DOCS_HEADERS)


def check_ready(service: Service) -> dict[str, bool]:
    """Return the body of a readiness check, or raise RequestError, 503: a batch does not end."""
    try:
        service.check_health()
    except RuntimeError as error:
        raise RequestError(503, "Unhealthy", str(error)) from None
    return {"ready": True}


def server_info(service: Service) -> dict[str, Any]:
    """Describe the models, with text-embeddings-inference's keys where it has them."""
    config, models = service.config, service.models
    default, filler, canary = models.default, models.mask_filler, models.canary
    labels = default.labels if default else []
    info: dict[str, Any] = {
        "model_id": default.name if default else models.mask_filler_name,
        "labels": labels,
        "max_input_length": default.classifier.longest if default else filler and filler.longest,
        "mask_token": filler and filler.mask_token,
        "explain": config.explain and default is not None,
        "long_texts": config.long_texts,
        "max_client_batch_size": config.max_texts,
        "models": [{"name": m.name, "version": m.version} for m in models.classifiers.values()],
        "version": __version__,
    }
    if default:
        fitted = default.classifier.task.fitted
        info |= {
            "model_sha": default.weights_hash,
            "model_dtype": default.classifier.precision,
            "model_type": {
                "classifier": {
                    "id2label": {str(i): label for i, label in enumerate(labels)},
                    "label2id": {label: i for i, label in enumerate(labels)},
                }
            },
            "task": default.classifier.task.name,
            "answer_form": default.classifier.task.answer_form,
            "reads_pairs": default.classifier.reads_pairs,
            "temperature": 1.0,  # raw scores are calibrated already
            "calibrated_temperature": default.classifier.calibrated_temperature,
            **{k: v for k, v in fitted.items() if k in default.classifier.task.fitted_keys},
            "max_batch_tokens": default.classifier.tokens_per_batch,
        }
    if canary and config.canary:
        share = config.canary.share
        info["canary"] = {"name": canary.name, "version": canary.version, "share": share}
    return info
