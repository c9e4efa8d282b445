"""Whatever is changed in a request of any client: an answer, or an error of one line, never a 5xx.

For models of every task; beside the JSON, headers, path, method, compression and bytes change.
"""

import gzip
import json
import zlib
from urllib.parse import quote

import pytest
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_process import Api
from model_directories import TASKS, make_directory
from mutations import byte_strings, json_values

from raybert.storage.folder import Folder

TEXTS = [
    "a superb film",
    "",
    " ",
    "\u200b",
    "\x00",
    "文字",
    "x" * 5000,
    "a [MASK] film",
    "é\u0301" * 90,
]
CHANGED = st.sampled_from(TEXTS)


def bodies(text, pairs):
    """A valid request of each form, by its path."""
    one = [text, "another"] if pairs else text
    shape = [1, 2] if pairs else [1]
    data = [one] if pairs else [text]
    parameters = {"top_k": 1, "function_to_apply": "softmax", "truncation": True}
    options = {"truncate": True, "raw_scores": False, "all_scores": True, "top_k": 2}
    more = {"threshold": 0.1, "explain": True, "model": "m"}
    tensor = {"name": "text", "shape": shape, "datatype": "BYTES", "data": data}
    return {
        "/predict": {"inputs": one, **options, **more},
        "/predict?x=1": {"inputs": [one] * 3, "parameters": parameters, "raw_scores": True},
        "/fill-mask": {"inputs": "a [MASK] film", "top_k": 3},
        "/": {"inputs": one, "parameters": parameters | {"ignore_labels": ["O"], "stride": 1}},
        "/v1/models/m:predict": {"instances": [one], "signature_name": "x"},
        "/v2/models/m/infer": {
            "id": "1",
            "inputs": [tensor],
            "outputs": [{"name": "label", "parameters": {"binary_data": True}}],
            "parameters": {"truncate": False, "binary_data_output": True},
        },
        "/v2/repository/index": {"ready": True},
    }


GETS = ["/", "/info", "/metrics", "/health", "/docs", "/openapi.json", "/v2", "/v2/health/ready"]
GETS += ["/v2/models/m", "/v2/models/m/config", "/v2/models/stats", "/v1/models", "/v1/models/m"]
SIGNS = ["", "/", "%00", "%0a", "..", "%2e%2e/", "%ff", ":", "?", "#", "é", "%", "m" * 3000]
HEADERS = {
    "content-type": [
        "application/json; charset=utf-16", "text/plain", "application/json, text/plain", "",
        "multipart/form-data; boundary=x", "application/x-www-form-urlencoded",
    ],
    "content-encoding": ["gzip", "br", "deflate", "gzip, gzip", "identity", "GZIP", "x", ""],
    "content-length": ["0", "-1", "9" * 30, "x", "1e3"],
    "inference-header-content-length": ["0", "5", "-1", "9" * 30, "x"],
    "accept": ["text/html", "*/*", ""],
    "accept-encoding": ["gzip", "br", "*;q=0"],
    "host": ["", "evil.example", "[::1]:80", "localhost:99999999", "a" * 9000],
    "origin": ["null", "https://evil.example"],
    "authorization": ["Bearer", "Bearer x", "Basic eDp5", "é"],
    "traceparent": ["x", "00-" + "0" * 32 + "-" + "0" * 16 + "-00"],
    "range": ["bytes=0-1", "bytes=99999999999-"],
    "if-none-match": ["*"],
    "expect": ["100-continue"],
    "x-forwarded-host": ["evil.example"],
    "transfer-encoding": ["chunked", "gzip"],
}  # fmt: skip

CHANGES = ["json", "json", "json", "bytes", "header", "path", "method", "pack"]


@st.composite
def requests(draw, pairs):
    """A request, with up to three of its parts changed."""
    known = bodies(draw(CHANGED), pairs)
    path = draw(st.sampled_from([*known, *known, *GETS]))
    method = "POST" if path in known else "GET"
    document = known.get(path, {})
    content, headers = json.dumps(document).encode(), {"content-type": "application/json"}
    for _ in range(draw(st.integers(1, 3))):
        how = draw(
            st.sampled_from(["json", "json", "json", "bytes", "header", "path", "method", "pack"])
        )
        if how == "json":
            document = draw(json_values(document)) if document else draw(json_values(known["/"]))
            content = json.dumps(document).encode()
        elif how == "bytes":
            content = draw(byte_strings(content))
        elif how == "header":
            name = draw(st.sampled_from(sorted(HEADERS)))
            headers[name] = draw(st.sampled_from(HEADERS[name]))
        elif how == "path":
            at = draw(st.integers(0, len(path)))
            path = "/" + (path[:at] + draw(st.sampled_from(SIGNS)) + path[at:]).lstrip("/")
        elif how == "method":
            method = draw(st.sampled_from(["GET", "POST", "HEAD", "PUT", "OPTIONS", "DELETE", "X"]))
        else:
            pack = draw(st.sampled_from([gzip.compress, zlib.compress, lambda data: data]))
            content = pack(content)
            headers["content-encoding"] = draw(st.sampled_from(["gzip", "deflate"]))
    sent = [(k.encode(), v.encode()) for k, v in headers.items()]
    return method, quote(path, safe="/%?:#"), content, sent


def check(api, request):
    method, path, content, headers = request
    answer = api.ask(method, path, content=content, headers=headers)
    kind = answer.headers.get("content-type", "")
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400 and method != "HEAD":
        body = answer.json()
        assert set(body) == {"error", "error_type"}, body
        assert body["error"].isprintable() and len(body["error"]) < 2000, body
        assert "Traceback" not in body["error"] and "site-packages" not in body["error"]
    elif kind.startswith("application/json") and method != "HEAD":
        json.dumps(answer.json(), allow_nan=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Start the server of a task, once."""
    made, found = Folder(tmp_path_factory.mktemp("servers")), {}
    make_directory(made / "masked", "masked")

    def get(name):
        if name not in found:
            make_directory(made / name, name)
            model = made / name / "model"
            found[name] = Api(model, made / "masked" / "model", models={"m": model.uri})
        return found[name]

    yield get
    for api in found.values():
        api.service.close()


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=examples(40), suppress_health_check=QUIET)
@given(data=st.data(), name=st.sampled_from(["pairs", "token_classification"]))
def test_a_changed_request_is_answered_or_refused(server, data, name):
    check(server(name), data.draw(requests(name == "pairs")))


@pytest.mark.slow
@settings(max_examples=2000, suppress_health_check=QUIET)
@given(data=st.data(), name=st.sampled_from(sorted(TASKS)))
def test_many_changed_requests_are_answered_or_refused(server, data, name):
    check(server(name), data.draw(requests(name == "pairs")))
