"""The application in this process, without sockets."""

import asyncio
import logging

import httpx
import torch

from raybert.serve.http.api import make_api
from raybert.serve.http.authentication import Keys, digest
from raybert.serve.runtime.service import Service
from raybert.serve.settings import ServeConfig

LOG = logging.getLogger("raybert.test")


class Api:
    """The application with its models; every call runs in an event loop of its own."""

    def __init__(self, model, pretrained, keys=(), page=None, **changes):
        values = {
            "model": model.uri,
            "fill_mask": pretrained.uri,
            "precision": "fp32",
            "max_body_kb": 64,
            "max_texts": 40,
            "max_tokens": 2000,
            **changes,
        }
        torch.set_num_threads(1)
        self.service = Service(ServeConfig.model_validate(values))
        self.service.load()
        digests = [digest(key.encode()) for key in keys]
        self.app = make_api(self.service, Keys(digests), log=LOG, page=page)

    def ask(self, method, path, **options):
        async def asked():
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await asyncio.wait_for(client.request(method, path, **options), 60)

        return asyncio.run(asked())

    def post(self, path, body, **options):
        return self.ask("POST", path, json=body, **options)

    def send(self, path, content, kind="application/json"):
        return self.ask("POST", path, content=content, headers={"Content-Type": kind})


def assert_error(response, status, words=""):
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "error_type"}
    assert words in body["error"]
    return body
