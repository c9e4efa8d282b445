"""`transformers.pipeline` behind FastAPI and uvicorn, a common way to serve a classifier.

One process. The pipeline runs in a thread beside the event loop, one call at a time (`--parallel`
allows more, which share torch's threads), without batching: the texts of a list are computed one by
one, the pipeline's default.
"""

from __future__ import annotations

import argparse
import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline


class Request(BaseModel):
    """The body of a request."""

    inputs: str | list[str]
    truncate: bool = True


def build_app(model: str, max_length: int, parallel: int) -> FastAPI:
    classify = pipeline(
        "text-classification",
        model=model,
        device="cpu",
        dtype=torch.float32,
        truncation=True,
        max_length=max_length,
    )
    pool = ThreadPoolExecutor(parallel)
    app = FastAPI()

    @app.post("/predict")
    async def predict(request: Request) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(pool, lambda: classify(request.inputs, top_k=None))

    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--parallel", type=int, default=1, help="concurrent calls of the pipeline")
    parser.add_argument("--max-length", type=int, default=512, help="tokens per text")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    app = build_app(given.model, given.max_length, given.parallel)
    uvicorn.run(app, host="127.0.0.1", port=given.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
