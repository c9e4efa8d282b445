"""The HTTP API in this process: responses, errors, and that no input causes a 5xx."""

import asyncio
import copy
import html
import json
import logging
import math
import re
import time
from concurrent.futures import Future

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import LOG, Api, assert_error
from making import reviews

from raybert.inference.classifier import TextClassifier
from raybert.pipeline.predict_stage import number_texts, predict_texts
from raybert.serve.http import middleware
from raybert.serve.request_errors import QUEUE_FULL_HEADER
from raybert.serve.runtime.batching import Overloaded

KEY = "a-key-of-mine-0123456789"
TEXTS = [text for text, _ in reviews(20, seed=7)] + ["superb " * 100]


def count(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"raybert_{name}", labels) or 0.0


@pytest.fixture(scope="module")
def api(model, pretrained):
    made = Api(model, pretrained)
    yield made
    made.service.close()


@pytest.fixture(scope="module")
def closed(model, pretrained):
    made = Api(model, pretrained, keys=[KEY])
    yield made
    made.service.close()


# Answers -----------------------------------------------------------------------------------------


def test_one_text_and_a_list(api):
    one = api.post("/predict", {"inputs": "a superb film"}).json()
    assert [set(score) for score in one] == [{"label", "score"}] * 2
    assert one[0]["label"] == "pos" and one[0]["score"] > one[1]["score"]
    assert sum(score["score"] for score in one) == pytest.approx(1, abs=1e-5)
    many = api.post("/predict", {"inputs": ["a superb film", "an awful film"]}).json()
    assert many[0] == one
    assert many[1][0]["label"] == "neg"


def test_lists_in_the_form_of_text_embeddings_inference(api):
    """Its documentation sends several texts as `[["a"], ["b"]]`, and its clients send all keys."""
    texts = ["a superb film", "an awful film"]
    keys = {"truncate": False, "truncation_direction": "Right", "raw_scores": False}
    keys |= {"parameters": {}}  # as huggingface_hub's client sends it
    wrapped = api.post("/predict", {"inputs": [[text] for text in texts], **keys})
    assert wrapped.json() == api.post("/predict", {"inputs": texts}).json()
    assert len(api.post("/fill-mask", {"inputs": [["a [MASK]"], ["[MASK]"]]}).json()) == 2


def test_raw_scores_and_all_scores(api):
    raw = api.post("/predict", {"inputs": "superb", "raw_scores": True}).json()
    logits = TextClassifier(api.service.find(None).folder, precision="fp32").logits(["superb"])
    assert sorted(score["score"] for score in raw) == pytest.approx(sorted(logits[0]), abs=1e-5)
    best = api.post("/predict", {"inputs": "superb", "all_scores": False}).json()
    assert [score["label"] for score in best] == ["pos"]


def test_a_text_scores_the_same_alone_in_a_list_and_through_predict(api):
    """Whatever else is in its batch, a text has the label and score of `raybert predict`."""
    listed = api.post("/predict", {"inputs": TEXTS}).json()
    found = [row for row in predict_texts(api.service.find(None).folder, number_texts(TEXTS))]
    exact = TextClassifier(api.service.find(None).folder, precision="fp32").probabilities(TEXTS)
    for text, scores, row, shares in zip(TEXTS, listed, found, exact, strict=True):
        alone = api.post("/predict", {"inputs": text}).json()
        assert alone[0]["label"] == scores[0]["label"] == row["label"]
        assert alone[0]["score"] == pytest.approx(scores[0]["score"], abs=1e-5)
        assert alone[0]["score"] == pytest.approx(float(shares.max()), abs=1e-5)


def test_concurrent_requests_score_as_each_alone(api):
    async def ask():
        transport = httpx.ASGITransport(app=api.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            asked = [client.post("/predict", json={"inputs": text}) for text in TEXTS * 3]
            return [response.json() for response in await asyncio.gather(*asked)]

    answers = asyncio.run(ask())
    exact = TextClassifier(api.service.find(None).folder, precision="fp32").probabilities(TEXTS)
    for scores, shares in zip(answers, np.tile(exact, (3, 1)), strict=True):
        assert scores[0]["score"] == pytest.approx(float(shares.max()), abs=1e-5)


def test_long_texts_are_truncated_or_read_in_windows(api):
    hidden = " ".join(["film"] * 60 + ["superb"] * 20 + ["film"] * 60)
    plain = " ".join(["film"] * 140)

    def score(text, **options):
        scores = api.post("/predict", {"inputs": text, **options}).json()
        return next(one["score"] for one in scores if one["label"] == "pos")

    cut = score(hidden, truncate=True)
    assert cut == pytest.approx(score(plain, truncate=True), abs=1e-5)
    assert score(hidden) == score(hidden, truncate=False) > score(plain) + 0.01
    assert score("superb", truncate=True) == score("superb")


def test_what_was_cut_is_said(api):
    long, short = "superb " * 100, "a superb film"
    cut = {"truncate": True}
    answers = api.post("/predict", {"inputs": [long, short], **cut}).json()
    assert [["truncated" in each for each in answer] for answer in answers] == [
        [True] * 2,
        [False] * 2,
    ]
    assert answers[0][0]["truncated"] is True
    whole = api.post("/predict", {"inputs": long}).json()
    assert not any("truncated" in each for each in whole)
    explained = api.post("/predict", {"inputs": [long, short], "explain": True, **cut}).json()
    assert [each.get("truncated") for each in explained] == [True, None]
    asked = {"inputs": [long, short], "parameters": {"truncation": True}}
    hub = api.post("/", asked).json()
    assert [answer[0].get("truncated") for answer in hub] == [True, None]
    for texts, parameters in (([short, long], {"truncated": True}), ([short], None)):
        asked = {"inputs": [tensor(texts)], "parameters": cut}
        found = api.post("/v2/models/run/infer", asked).json()
        assert found.get("parameters") == parameters
    exact = api.service.models.default.classifier
    words = " ".join(["film"] * (exact.longest - 2))
    assert len(exact.encode([words])[0]) == exact.longest
    for text, is_cut in ((words, False), (f"{words} film", True)):
        answer = api.post("/predict", {"inputs": text, **cut}).json()[0]
        assert ("truncated" in answer) == is_cut


def test_explanations(api):
    text = "the film was superb"
    found = api.post("/predict", {"inputs": text, "explain": True}).json()
    assert set(found) == {"predictions", "label", "words", "error"}
    assert found["predictions"] == api.post("/predict", {"inputs": text}).json()
    assert [set(word) for word in found["words"]] == [
        {"text", "start", "end", "weight", "input"}
    ] * 4
    assert max(found["words"], key=lambda word: word["weight"])["text"] == "superb"
    total = sum(word["weight"] for word in found["words"])
    assert total > 1 and found["error"] < 0.03 * total
    [one, two] = api.post("/predict", {"inputs": [text, "awful"], "explain": True}).json()
    assert one["words"] == found["words"]
    assert two["predictions"][0]["label"] == "neg"
    assert_error(api.post("/predict", {"inputs": ["a"] * 9, "explain": True}), 413, "8 that are")


def test_masks_are_filled(api):
    [one] = api.post("/fill-mask", {"inputs": "the [MASK] was", "top_k": 3}).json()
    assert [set(guess) for guess in one] == [{"token_str", "score"}] * 3
    assert one[0]["score"] >= one[1]["score"]
    two = api.post("/fill-mask", {"inputs": ["[MASK] [MASK]", "a [MASK]"]}).json()
    assert [len(masks) for masks in two] == [2, 1]
    assert_error(api.post("/fill-mask", {"inputs": "no mask"}), 422, "has no [MASK]")
    assert_error(api.post("/fill-mask", {"inputs": "[MASK] " * 100}), 422, "the model reads 64")


def test_too_many_masks_are_rejected(api, monkeypatch):
    filled, models = [], api.service.models
    fill = models.mask_filler.fill
    monkeypatch.setattr(
        models.mask_filler, "fill", lambda text, top: filled.append(text) or fill(text, top)
    )
    full = {"inputs": ["[MASK] " * 60] * 2, "top_k": 84}
    assert_error(api.post("/fill-mask", full), 413, "10,080 predictions are more than the 10,000")
    assert_error(
        api.post("/fill-mask", {"inputs": ["a [MASK]"] * 33}), 413, "33 texts are more than"
    )
    assert filled == []
    assert api.post("/fill-mask", {**full, "top_k": 5}).is_success


def test_masks_of_a_request_that_timed_out_are_not_filled(model, pretrained, monkeypatch):
    slow = Api(model, pretrained, timeout_s=0.05)
    filled = []

    def fill(text, top):
        filled.append(text)
        time.sleep(0.1)
        return []

    monkeypatch.setattr(slow.service.models.mask_filler, "fill", fill)
    assert_error(slow.post("/fill-mask", {"inputs": ["a [MASK]"] * 30}), 504)
    slow.service._serial_thread.submit(int).result(30)
    assert len(filled) == 1
    slow.service.close()


def test_info_and_metrics_describe_the_models(api):
    api.post("/predict", {"inputs": ["a", "b"]})
    info = api.ask("GET", "/info").json()
    assert info["labels"] == ["neg", "pos"]
    assert info["max_input_length"] == 32
    assert info["mask_token"] == "[MASK]"
    assert info["model_dtype"] == "fp32"
    lines = api.ask("GET", "/metrics").text.splitlines()
    name = info["model_id"]
    assert 'raybert_requests_total{route="/predict",status="200"} ' in "\n".join(lines)
    texts = next(line for line in lines if line.startswith(f'raybert_texts_total{{model="{name}"'))
    assert float(texts.split()[-1]) >= 2
    assert 'raybert_request_seconds_bucket{le="0.005",route="/predict"} ' in "\n".join(lines)


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/v2/health/ready"])
def test_health(api, path):
    assert api.ask("GET", path).json() == {"ready": True}
    assert api.ask("GET", "/health/live").json() == {"live": True}


# The Open Inference Protocol ---------------------------------------------------------------------


def tensor(texts, **changes):
    return {"name": "text", "shape": [len(texts)], "datatype": "BYTES", "data": texts, **changes}


def test_open_inference(api):
    assert api.ask("GET", "/v2").json()["name"] == "raybert"
    name = api.ask("GET", "/info").json()["model_id"]
    described = api.ask("GET", f"/v2/models/{name}").json()
    assert described["outputs"][1] == {"name": "scores", "datatype": "FP32", "shape": [-1, 2]}
    assert api.ask("GET", f"/v2/models/{name}/ready").json() == {"name": name, "ready": True}
    path, texts = f"/v2/models/{name}/infer", ["a superb film", "awful"]
    found = api.post(path, {"id": "7", "inputs": [tensor(texts)]}).json()
    assert (found["id"], found["model_name"]) == ("7", name)
    label, scores = found["outputs"]
    assert label["data"] == ["pos", "neg"] and label["shape"] == [2]
    assert scores["shape"] == [2, 2] and len(scores["data"]) == 4
    expected = api.post("/predict", {"inputs": texts[0]}).json()[0]["score"]
    assert scores["data"][1] == pytest.approx(expected, abs=1e-5)
    only = api.post(path, {"inputs": [tensor(texts)], "outputs": [{"name": "label"}]}).json()
    assert [output["name"] for output in only["outputs"]] == ["label"]


def test_open_inference_in_the_forms_that_its_clients_send(api):
    """Without a Content-Type, nested as the shape is, with nulls, and with a version."""
    name = next(iter(api.service.models.classifiers))
    path, texts = f"/v2/models/{name}", ["a superb film", "awful"]
    expected = api.post(f"{path}/infer", {"inputs": [tensor(texts)]}).json()
    nested = tensor([[text] for text in texts], shape=[2, 1], parameters=None)
    bare = json.dumps({"inputs": [nested], "outputs": None, "parameters": None}).encode()
    assert api.ask("POST", f"{path}/infer", content=bare).json() == expected
    assert_error(api.send(f"{path}/infer", bare, "text/plain"), 415)
    one, other = (f"{path}/versions/{version}" for version in (expected["model_version"], "x"))
    assert api.ask("POST", f"{one}/infer", content=bare).json() == expected
    assert api.ask("GET", one).json() == api.ask("GET", path).json()
    assert api.ask("GET", f"{one}/ready").json() == {"name": name, "ready": True}
    assert_error(api.ask("POST", f"{other}/infer", content=bare), 404, "no such version")
    assert_error(api.ask("GET", other), 404)
    assert_error(api.ask("GET", f"{other}/ready"), 404)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"inputs": []}, 422),
        ({"inputs": [tensor([["a"], "b"])]}, 422),
        ({"inputs": [tensor([["a", "b"]], shape=[1])]}, 422),
        ({"inputs": [tensor(["a"], shape=[2])]}, 422),
        ({"inputs": [tensor(["a"], shape=[-1, -1])]}, 422),
        ({"inputs": [tensor(["a"], datatype="FP32")]}, 422),
        ({"inputs": [tensor(["a"]), tensor(["b"])]}, 422),
        ({"inputs": [tensor([])]}, 400),
        ({"inputs": [tensor(["a"])], "outputs": [{"name": "x"}]}, 422),
        ({"inputs": [tensor(["a"])], "outputs": [{"name": "label"}] * 3}, 422),
        ({"inputs": [tensor(["a"], shape=[1] * 9)]}, 422),
        ({"inputs": [tensor(["a"], shape=[10**4000] * 8)]}, 422),
        ({"inputs": [tensor(["a"])], "parameters": {"truncate": "yes"}}, 422),
    ],
)
def test_open_inference_rejects_invalid_requests(api, body, status):
    name = next(iter(api.service.models.classifiers))
    assert_error(api.post(f"/v2/models/{name}/infer", body), status)


def test_a_model_that_is_not_served(api):
    for path in ("/v2/models/other", "/v2/models/other/ready"):
        assert_error(api.ask("GET", path), 404)
    assert_error(api.post("/v2/models/other/infer", {"inputs": [tensor(["a"])]}), 404)
    assert_error(api.post("/predict", {"inputs": "a", "model": "other"}), 404, "no such classifier")


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"inputs": ""}, 400, "is empty"),
        ({"inputs": " \n\t"}, 400, "is empty"),
        ({"inputs": []}, 400, "is empty"),
        ({"inputs": ["a", ""]}, 400, "inputs.1 is empty"),
        ({"inputs": 5}, 422, "inputs: give a text, or a list of texts"),
        ({"inputs": ["a", 5]}, 422, "inputs: give a text"),
        ({"inputs": [["a", "b"]]}, 422, "inputs: give a text"),
        ({"inputs": None}, 422, "inputs: give a text"),
        ({}, 422, "inputs"),
        ([], 422, ""),
        ({"inputs": "a", "truncate": "yes"}, 422, "truncate"),
        ({"inputs": "a", "parameters": {"top_p": 1}}, 422, "parameters.top_p"),
        ({"inputs": "a", "parameters": {"top_k": "1"}}, 422, "parameters.top_k"),
        ({"inputs": "a", "parameters": []}, 422, "parameters"),
        ({"inputs": "a", "explian": True}, 422, "unknown key explian"),
        ({"inputs": "a", "x" * 5000: 1}, 422, "unknown key xxxx"),
        ({"inputs": ["a"] * 41}, 413, "41 texts are more than the 40"),
        ({"inputs": ["film " * 100] * 40, "truncate": False}, 413, "tokens are more than"),
        ({"inputs": "film " * 20_000}, 413, "the body has more than 65,536 bytes"),
    ],
)
def test_predict_rejects_invalid_requests(api, body, status, words):
    found = assert_error(api.post("/predict", body), status, words)
    assert len(found["error"]) < 300


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"nonsense",
        b'{"inputs": "\xff\xfe"}',
        b'{"inputs": "\\ud800"}',
        b'{"inputs": "\\ud800\\ud800 film"}',
        b"[" * 60_000,
        b'{"inputs": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
        b"",
        b"   ",
        b"\x00",
    ],
)
def test_a_body_that_is_not_json_is_rejected(api, content):
    assert_error(api.send("/predict", content), 400)


@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "-Infinity", "1e400", "9" * 5000, "-0", "5."]
)
def test_invalid_numbers_are_rejected(api, number):
    for path, body in (
        ("/fill-mask", '{"inputs": "a [MASK]", "top_k": %s}'),
        ("/predict", '{"inputs": "a", "truncate": %s}'),
        ("/predict", '{"inputs": %s}'),
        ("/v2/models/x/infer", '{"inputs": [{"shape": [%s], "datatype": "BYTES", "data": ["a"]}]}'),
        ("/v2/models/x/infer", '{"inputs": [], "parameters": {"truncate": %s}}'),
    ):
        assert api.send(path, (body % number).encode()).status_code in (400, 404, 422)


def test_of_equal_keys_the_last_is_used(api):
    twice = api.send("/predict", b'{"inputs": "awful", "inputs": "superb"}')
    assert twice.json() == api.post("/predict", {"inputs": "superb"}).json()


@pytest.mark.parametrize("charset", ["utf-16", "latin-1", "nonsense", '"', ""])
def test_json_is_utf_8_whatever_the_charset_says(api, charset):
    kind = f"application/json; charset={charset}"
    assert api.send("/predict", b'{"inputs": "superb"}', kind).is_success
    assert_error(api.send("/predict", '{"inputs": "superb"}'.encode("utf-16"), kind), 400)
    assert_error(api.send("/predict", b'{"inputs": "\xe9"}', kind), 400)


def test_many_mistakes_are_described_in_one_line(api):
    many = {f"key{number}": 1 for number in range(3000)}
    found = assert_error(
        api.post("/predict", {**many, "inputs": "a"}), 422, "3,000 mistakes; known"
    )
    assert len(found["error"]) < 200


@pytest.mark.parametrize("length", ["", "-1", "abc", "9" * 30, "1" * 5000, "\u00b2"])
def test_an_invalid_content_length_is_ignored(api, length):
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", length.encode("latin-1")),
    ]
    answer = api.ask("POST", "/predict", content=b'{"inputs": "superb"}', headers=headers)
    assert answer.status_code == (413 if len(length) >= 30 else 200)


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE"])
@pytest.mark.parametrize("path", ["/predict", "/info", "/docs", "/v2/models/x/infer", "/nothing"])
def test_other_methods_are_rejected(api, method, path):
    assert api.ask(method, path).status_code in (404, 405)


def test_a_closed_connection_is_not_logged_as_a_failure(api, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger=LOG.name)

    async def wait(*arguments):
        await asyncio.sleep(60)

    monkeypatch.setattr(api.service, "score", wait)

    async def leave():
        transport = httpx.ASGITransport(app=api.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await asyncio.wait_for(client.post("/predict", json={"inputs": "a"}), 0.1)

    with pytest.raises(TimeoutError):
        asyncio.run(leave())
    assert [r.http_status for r in caplog.records if r.name == LOG.name] == [499]


def test_another_content_type_is_rejected(api):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert_error(api.send("/predict", b'{"inputs": "a"}', kind), 415)
    assert api.send("/predict", b'{"inputs": "a"}', "Application/JSON; charset=utf-8").is_success


def test_an_endless_body_is_rejected_at_the_limit(api):
    async def parts():
        while True:
            yield b'{"inputs": "' + b"a" * 8192

    assert_error(api.send("/predict", parts()), 413)


def test_unknown_paths_and_methods(api):
    assert_error(api.ask("GET", "/nothing"), 404, "/docs")
    assert_error(api.ask("GET", "/predict"), 405, "this path takes POST")
    assert_error(api.ask("DELETE", "/info"), 405, "this path takes GET")


@pytest.mark.parametrize(
    "text",
    [
        "\x00\x01\x02",
        "<br" + " " * 60_000,
        "<" * 60_000,
        "😀" * 10_000,
        "e" + "\u0301" * 20_000,
        "\u202e\ufeff\u200b",
        "[CLS] [SEP] [PAD] [UNK] [MASK]",
        "a" * 60_000,
        "!?" * 30_000,
    ],
)
def test_unusual_texts_are_answered_or_rejected(api, text):
    response = api.post("/predict", {"inputs": text})
    if response.status_code == 200:
        assert {score["label"] for score in response.json()} == {"neg", "pos"}
    else:
        assert 400 <= response.status_code < 500
        assert_error(response, response.status_code)


def element(text):
    """A text as an element of a binary tensor."""
    data = text.encode("utf-8", "surrogatepass")
    return len(data).to_bytes(4, "little") + data


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "inputs": values | st.text() | st.lists(st.text(), max_size=5),
        "truncate": values | st.booleans(),
        "raw_scores": values | st.booleans(),
        "explain": values | st.booleans(),
        "top_k": values | st.integers(1, 9),
        "shape": values,
        "model": values,
        "instances": values | st.text() | st.lists(st.text(), max_size=5),
        "parameters": values
        | st.fixed_dictionaries(
            {},
            optional={
                "top_k": values | st.integers(1, 9),
                "function_to_apply": values | st.sampled_from(["softmax", "sigmoid", "none"]),
                "targets": values | st.lists(st.text(), max_size=3),
                "truncation": values,
            },
        ),
    },
)


POSTS = ["/predict", "/fill-mask", "/", "/v2/models/run/infer", "/v1/models/run:predict"]


@given(path=st.sampled_from(POSTS), body=bodies | values)
@settings(max_examples=300, deadline=None)
def test_no_body_causes_a_server_error(api, path, body):
    content = json.dumps(body).encode()  # surrogates and NaN are written, too
    response = api.send(path, content)
    assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
    if response.status_code != 200:
        error = assert_error(response, response.status_code)["error"]
        assert "Traceback" not in error and "/site-packages/" not in error


@given(path=st.sampled_from(POSTS), content=st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_no_bytes_cause_a_server_error(api, path, content):
    assert 400 <= api.send(path, content).status_code < 500


@given(
    tensors=st.lists(st.binary(max_size=40) | st.text(max_size=9).map(element), max_size=3),
    sizes=st.lists(values | st.integers(0, 50), max_size=3),
    shape=st.integers(0, 4),
    length=st.integers(0, 400) | st.sampled_from(["", "-1", "x", "9" * 30, "\u00b2"]),
    right=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_no_binary_tensors_cause_a_server_error(api, tensors, sizes, shape, length, right):
    inputs = [{**tensor(["a"], shape=[shape]), "parameters": {"binary_data_size": size}}
              for size in (map(len, tensors) if right else sizes)]  # fmt: skip
    for one in inputs:
        del one["data"]
    head = json.dumps({"inputs": inputs}).encode()
    headers = [(b"inference-header-content-length",
                str(len(head) if right else length).encode("latin-1"))]  # fmt: skip
    path, content = "/v2/models/run/infer", head + b"".join(tensors)
    response = api.ask("POST", path, content=content, headers=headers)
    if response.status_code != 200:
        assert 400 <= response.status_code < 500
        assert_error(response, response.status_code)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200))
@settings(max_examples=200, deadline=None)
def test_every_text_that_is_not_empty_has_probabilities(api, text):
    response = api.post("/predict", {"inputs": text})
    if not text.strip():
        assert_error(response, 400)
        return
    assert sum(score["score"] for score in response.json()) == pytest.approx(1, abs=1e-4)


# Keys --------------------------------------------------------------------------------------------

ASKED = [("GET", "/info"), ("GET", "/metrics"), ("POST", "/predict"), ("GET", "/v2"), ("GET", "/x")]
ASKED += [("POST", "/"), ("POST", "/docs"), ("POST", "/v2/repository/index"), ("GET", "/v1/models")]
ASKED += [("POST", "/v1/models/run:predict"), ("GET", "/v2/models/stats")]


@pytest.mark.parametrize(("method", "path"), ASKED)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"X-Api-Key": KEY},
    ],
)
def test_without_the_key_every_path_answers_401(closed, method, path, headers):
    response = closed.ask(method, path, headers=headers)
    assert_error(response, 401)
    assert response.headers["WWW-Authenticate"] == "Bearer"


def test_a_key_in_the_url_is_not_accepted_and_not_logged(closed, caplog):
    caplog.set_level(logging.DEBUG)
    for path in (f"/info?key={KEY}", f"/info?authorization=Bearer%20{KEY}", f"/{KEY}"):
        assert_error(closed.ask("GET", path), 401)
    closed.post("/predict", {"inputs": "secret words"}, headers={"Authorization": f"Bearer {KEY}"})
    ours = [vars(record) for record in caplog.records if record.name.startswith("raybert")]
    assert len(ours) == 4
    assert KEY not in str(ours) and "secret" not in str(ours)


def test_with_the_key_requests_are_answered(closed):
    headers = {"Authorization": f"bearer  {KEY}"}
    assert closed.ask("GET", "/info", headers=headers).is_success
    assert closed.post("/predict", {"inputs": "superb"}, headers=headers).is_success


def test_health_and_docs_need_no_key(closed):
    for path in ("/health", "/health/live", "/v2/health/ready", "/docs", "/openapi.json"):
        assert closed.ask("GET", path).is_success


def test_one_line_per_request_is_logged(api, caplog):
    caplog.set_level(logging.INFO, logger=LOG.name)
    api.post("/predict", {"inputs": ["one text", "another"]})
    api.ask("GET", "/nothing/secret")
    one, two = (r for r in caplog.records if r.name == LOG.name)
    assert (one.http_method, one.http_route, one.http_status) == ("POST", "/predict", 200)
    assert one.texts == 2 and one.milliseconds > 0
    assert (two.http_route, two.http_status) == ("-", 404)


def test_only_configured_origins_get_cors_headers(model, pretrained, api):
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    answer = api.ask("OPTIONS", "/predict", headers=asked)
    assert "access-control-allow-origin" not in answer.headers
    opened = Api(model, pretrained, keys=[KEY], cors=["https://a.example"])
    answer = opened.ask("OPTIONS", "/predict", headers=asked)  # browsers send it without a key
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    other = opened.ask("OPTIONS", "/predict", headers={**asked, "Origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers
    opened.service.close()


# Overload, time-outs, failures -------------------------------------------------------------------


def test_a_full_queue_is_reported_before_the_body_is_read(api, monkeypatch):
    batcher = api.service.find(None).batcher
    monkeypatch.setattr(batcher, "_speed", 1000.0)
    monkeypatch.setattr(batcher, "_queued_tokens", 5000)
    response = api.send("/predict", b"not even JSON")
    assert_error(response, 429, "try again in 5 s")
    assert response.headers["Retry-After"] == "5"
    assert api.post("/fill-mask", {"inputs": "a [MASK]"}).is_success  # it does not use this queue


def test_a_short_request_is_accepted_after_long_ones_where_it_fits(api, monkeypatch):
    """The mean of the last requests does not fit, and their bodies' sizes say which."""
    batcher = api.service.find(None).batcher
    monkeypatch.setattr(batcher, "_speed", 1000.0)  # 4,096 tokens may wait
    monkeypatch.setattr(batcher, "_queued_tokens", batcher.capacity - 20)
    monkeypatch.setattr(batcher, "_mean_request_tokens", 2000.0)
    monkeypatch.setattr(api.service, "_tokens_per_character", 0.2)
    assert api.post("/predict", {"inputs": "a superb film"}).is_success
    monkeypatch.setattr(batcher, "_mean_request_tokens", 2000.0)
    assert_error(api.post("/predict", {"inputs": ["superb film " * 20]}), 429)


def test_the_load_is_what_waits_and_the_time_that_was_computed(api, monkeypatch):
    service = api.service
    batcher = service.find(None).batcher
    service.load_since_last()
    assert service.load_since_last() == 0
    monkeypatch.setattr(batcher, "_queued_tokens", batcher.capacity // 2)
    assert service.load_since_last() == pytest.approx(0.5, abs=0.01)
    monkeypatch.setattr(batcher, "_queued_tokens", 3 * batcher.capacity)
    monkeypatch.setattr(batcher, "_busy_s", batcher.busy_s + 3600)
    assert service.load_since_last() == 2  # it computed all the time, and the queue is full
    monkeypatch.undo()
    monkeypatch.setattr(service._serial, "_count", 4)  # explanations and masks
    assert service.load_since_last() == 0.5


def test_the_warm_up_measures_the_speed(api):
    batcher = api.service.find(None).batcher
    assert batcher._speed and batcher.capacity >= 2 * batcher._tokens_per_batch


def test_requests_without_room_are_rejected_before_they_are_tokenized(api, monkeypatch):
    served = api.service.find(None)
    read = []
    encode = served.encode

    def noting(texts, *, windows):
        read.extend(texts)
        time.sleep(0.05)  # so that all the others arrive meanwhile
        return encode(texts, windows=windows)

    monkeypatch.setattr(served, "encode", noting)
    monkeypatch.setattr(served.batcher, "_speed", 1.0)  # room for two batches
    monkeypatch.setattr(served.batcher, "_update_speed", lambda tokens, seconds: None)
    monkeypatch.setattr(api.service, "_tokens_per_character", 1.0)
    text = "superb " * 300  # about 2,100 tokens: only two fit

    async def ask():
        return await asyncio.gather(
            *(api.service.score([text], None, False) for _ in range(20)), return_exceptions=True
        )

    answers = asyncio.run(ask())
    rejections = [one for one in answers if isinstance(one, Overloaded)]
    assert len(rejections) == 20 - len(read) and 1 <= len(read) <= 2


def test_a_truncated_text_reserves_no_more_room_than_its_remaining_tokens(api, monkeypatch):
    """The model reads 32 tokens, however long the text is."""
    served = api.service.find(None)
    seen, encode = [], served.encode

    def noting(texts, *, windows):
        seen.append(served.batcher._reserved_tokens)
        return encode(texts, windows=windows)

    monkeypatch.setattr(served, "encode", noting)
    monkeypatch.setattr(api.service, "_tokens_per_character", 0.2)
    for inputs in ("superb " * 8000, ["superb " * 4000, "superb"]):
        assert api.post("/predict", {"inputs": inputs, "truncate": True}).is_success
    assert seen == [32, 33]
    # A truncated text does not change the average of tokens per character.
    assert api.service._tokens_per_character == 0.2
    assert api.post("/predict", {"inputs": "superb"}).is_success
    assert api.service._tokens_per_character != 0.2


def test_with_several_models_requests_are_rejected_when_all_queues_are_full(
    model, pretrained, monkeypatch
):
    several = Api(model, pretrained, models={"second": model.uri})
    first, second = (served.batcher for served in several.service.models.classifiers.values())
    for batcher, queued in ((first, 5000), (second, 7000)):
        monkeypatch.setattr(batcher, "_speed", 1000.0)
        assert several.post("/predict", {"inputs": "a", "model": "second"}).is_success
        monkeypatch.setattr(batcher, "_speed", 1000.0)
        monkeypatch.setattr(batcher, "_queued_tokens", queued)
        full = several.post("/predict", {"inputs": "a", "model": "run"})
        assert_error(full, 429, "try again in 5 s")
        assert (QUEUE_FULL_HEADER in full.headers) == (batcher is second)
    response = several.send("/predict", b"not even JSON")
    assert_error(response, 429, "try again in 5 s")
    assert response.headers[QUEUE_FULL_HEADER] == "1"
    several.service.close()


@pytest.fixture
def shedding(closed, monkeypatch):
    """The application behind LoadSheddingMiddleware; `passed` has the paths that it passed on."""
    passed = []

    async def inside(scope, receive, send):
        passed.append(scope["path"])
        await closed.app(scope, receive, send)

    made = copy.copy(closed)
    made.app, made.passed = middleware.LoadSheddingMiddleware(inside), passed
    monkeypatch.setattr(middleware, "_admission", closed.app.state.admission)
    return made


def test_a_full_queue_is_reported_in_front_of_serve(shedding, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger=LOG.name)
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"inputs": "superb"}
    assert shedding.post("/predict", body, headers=headers).is_success
    batcher = shedding.service.find(None).batcher
    monkeypatch.setattr(batcher, "_speed", 1000.0)
    monkeypatch.setattr(batcher, "_queued_tokens", 5000)
    assert_error(shedding.post("/predict", body, headers=headers), 429, "try again in 5 s")
    assert_error(
        shedding.post("/predict", body), 401
    )  # without a key a client does not learn the load
    assert shedding.passed == ["/predict"]
    assert shedding.ask("GET", "/info", headers=headers).is_success
    statuses = [record.http_status for record in caplog.records if record.name == LOG.name]
    assert statuses == [200, 429, 401, 200]


def test_rejections_share_a_log_line(shedding, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger=LOG.name)
    headers = {"Authorization": f"Bearer {KEY}"}
    batcher = shedding.service.find(None).batcher
    monkeypatch.setattr(batcher, "_speed", 1000.0)
    monkeypatch.setattr(batcher, "_queued_tokens", 5000)
    monkeypatch.setattr(middleware._admission, "_logged_at", -math.inf)
    monkeypatch.setattr(middleware, "_LOG_INTERVAL_S", 3600)
    before = count(shedding.service.metrics, "requests_total", route="-", status="429")
    answers = [shedding.post("/predict", {"inputs": "a"}, headers=headers) for _ in range(9)]
    assert {answer.status_code for answer in answers} == {429}
    assert len({answer.content for answer in answers}) == 1
    assert answers[-1].headers[QUEUE_FULL_HEADER] == "1"  # for HAProxy
    monkeypatch.setattr(middleware, "_LOG_INTERVAL_S", 0)
    shedding.ask("GET", "/health")
    counts = [r.requests for r in caplog.records if r.name == LOG.name and r.http_status == 429]
    assert counts == [1, 8]
    assert count(shedding.service.metrics, "requests_total", route="-", status="429") == before + 9


def test_a_header_that_is_not_utf_8_is_rejected_in_front_of_serve(shedding):
    headers = [(b"x-request-id", b"\xff\xfe"), (b"authorization", f"Bearer {KEY}".encode())]
    assert_error(shedding.ask("GET", "/info", headers=headers), 400, "not UTF-8")
    assert shedding.passed == []


def test_a_slow_request_ends_with_504(model, pretrained):
    slow = Api(model, pretrained, timeout_s=0.05)
    block = Future()
    slow.service._threads.all_cores.submit(block.result, 30)  # something else computes
    try:
        assert_error(slow.post("/predict", {"inputs": "superb"}), 504, "no answer within 0.05 s")
    finally:
        block.set_result(None)
    slow.service._threads.all_cores.submit(int).result(30)
    assert slow.service.find(None).batcher.queued_tokens == 0
    slow.service.close()


def test_a_failing_model_is_reported_without_its_traceback(api, monkeypatch, caplog):
    served = api.service.find(None)

    def broken(rows):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(served.batcher, "_compute", broken)
    body = assert_error(api.post("/predict", {"inputs": "superb"}), 424)
    assert "secret" not in str(body)
    assert "RuntimeError" in caplog.text
    monkeypatch.undo()
    assert api.post("/predict", {"inputs": "superb"}).is_success


def test_scores_that_are_not_finite_are_a_failure(api, monkeypatch):
    served = api.service.find(None)
    nothing = np.full((1, 2), np.nan, np.float32)
    monkeypatch.setattr(served.batcher, "_compute", lambda rows: nothing)
    assert_error(api.post("/predict", {"inputs": "superb"}), 424)


def test_guesses_that_are_not_finite_are_a_failure(api, monkeypatch):
    guesses = [[{"token": "film", "probability": float("nan")}]]
    monkeypatch.setattr(api.service.models.mask_filler, "fill", lambda text, top: guesses)
    assert_error(api.post("/fill-mask", {"inputs": "the [MASK]"}), 424)


# The OpenAPI document and the page ---------------------------------------------------------------


def test_the_document_describes_every_body(api):
    document = api.ask("GET", "/openapi.json").json()
    schemas = document["components"]["schemas"]

    def references(value):
        if isinstance(value, dict):
            yield from ([value["$ref"]] if "$ref" in value else [])
            value = list(value.values())
        for inner in value if isinstance(value, list) else []:
            yield from references(inner)

    for path in ("/health", "/health/ready", "/v2/health/ready", "/v2/models/{name}/ready"):
        answer = document["paths"][path]["get"]["responses"]["503"]
        assert list(references(answer)) == ["#/components/schemas/Error"]
    used = {reference.rpartition("/")[2] for reference in references(document)}
    assert {"PredictRequest", "FillMaskRequest", "InferRequest", "Error"} <= used
    assert used <= set(schemas)
    body = document["paths"]["/predict"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"]["$ref"].endswith("/PredictRequest")


def test_the_examples_of_the_document_are_answered_in_its_form(api):
    document = api.ask("GET", "/openapi.json").json()
    name = next(iter(api.service.models.classifiers))
    for path in ("/predict", "/fill-mask", "/v2/models/{name}/infer"):
        operation = document["paths"][path]["post"]
        asked = operation["requestBody"]["content"]["application/json"]["example"]
        answer = api.post(path.format(name=name), asked).json()
        example = operation["responses"]["200"]["content"]["application/json"]["example"]
        assert shape_of(answer) == shape_of(example)


def shape_of(value):
    """The keys and types of a response."""
    if isinstance(value, dict):
        return {key: shape_of(inner) for key, inner in value.items()}
    return [shape_of(inner) for inner in value] if isinstance(value, list) else type(value)


def test_the_document_lists_only_statuses_that_occur(api):
    document = api.ask("GET", "/openapi.json").json()
    assert not [name for name in document["components"]["schemas"] if "ValidationError" in name]
    for path, methods in document["paths"].items():
        for operation in methods.values():
            statuses = {
                status: answer["description"] for status, answer in operation["responses"].items()
            }
            assert "health" in path or "401" in statuses
            assert "422" not in statuses or statuses["422"].startswith("the body has another form")


def test_the_docs_page_loads_nothing_from_other_servers(api):
    answer = api.ask("GET", "/docs")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["Content-Security-Policy"].split("; ")
    assert "default-src 'none'" in policy and not [rule for rule in policy if "unsafe" in rule]
    text = answer.text
    assert "<script" not in text and "style=" not in text and "//" not in text.lower()
    for path, methods in api.ask("GET", "/openapi.json").json()["paths"].items():
        for method in methods:
            assert f"<code>{method.upper()} {path}</code>" in text
    assert '{"inputs": "The plot was' in html.unescape(text)  # an example
    assert '<a href="#PredictRequest">' in text and 'id="PredictRequest"' in text
    links = set(re.findall(r'href="#(\w+)"', text))
    assert links <= set(re.findall(r'id="(\w+)"', text))


def test_the_page_is_served_beside_the_api(model, pretrained, tmp_path):
    (tmp_path / "index.html").write_text("<!doctype html><title>here</title>")
    (tmp_path / "app.js").write_text("1;")
    api = Api(model, pretrained, keys=[KEY], page=tmp_path)
    assert "here" in api.ask("GET", "/").text
    assert api.ask("GET", "/app.js").text == "1;"
    assert api.ask("GET", "/health").json() == {"ready": True}
    assert api.ask("HEAD", "/health/live").status_code == 200
    own = {"Authorization": f"Bearer {KEY}"}
    answer = api.ask("GET", "/predict", headers=own)  # is no file that is missing
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")
    for path in ("/nothing", "/predict/"):
        assert_error(api.post(path, {"inputs": "a"}, headers=own), 404)
    assert_error(api.post("/app.js", {}, headers=own), 405)
    for path in ("/secret.txt", "/../conftest.py", "/%2e%2e/conftest.py"):
        assert api.ask("GET", path).status_code == 401
    api.service.close()
