"""Clients that others maintain, used as their documentation shows, against the application."""

import json
import logging
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from model_directories import make_directory
from stand_in import Running

from raybert.serve.http.api import make_api
from raybert.serve.http.authentication import Keys
from raybert.serve.runtime.service import Service
from raybert.serve.settings import ServeConfig
from raybert.storage.folder import Folder

GOOD, BAD = "a superb moving film", "an awful boring film"
# kserve 0.21 needs older psutil, protobuf and pandas: `make test-slow` makes an environment for it.
KSERVE = Path(sys.prefix) / "kserve" / "bin" / "python"


@pytest.fixture(scope="module")
def served(model, pretrained, tmp_path_factory):
    """The address of a server with a classifier, models of other tasks, and one for masks."""
    made, models = tmp_path_factory.mktemp("models"), {"reviews": model.uri}
    for name in ("token_classification", "multi_label", "regression", "pairs"):
        make_directory(Folder(made / name), name)
        models[name] = str(made / name / "model")
    first = models.pop("reviews")
    values = {"model": first, "models": models, "fill_mask": pretrained.uri, "precision": "fp32"}
    service = Service(ServeConfig.model_validate(values), threads=1)
    service.load()
    log = logging.getLogger("raybert.test")
    with Running(make_api(service, Keys([]), log=log), lifespan="on") as server:
        yield server.url.rstrip("/")
    service.close()


@pytest.fixture(scope="module")
def tagging(tmp_path_factory):
    """The address of a server whose only model tags tokens."""
    folder = Folder(tmp_path_factory.mktemp("tags"))
    make_directory(folder, "token_classification")
    service = Service(ServeConfig(model=(folder / "model").uri, precision="fp32"), threads=1)
    service.load()
    log = logging.getLogger("raybert.test")
    with Running(make_api(service, Keys([]), log=log, page=None), lifespan="on") as server:
        yield server.url
    service.close()


# huggingface_hub ---------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub = pytest.importorskip("huggingface_hub")
    return hub.InferenceClient


@pytest.mark.parametrize("path", ["", "/", "/predict"])
def test_the_hub_client_classifies_a_text(served, hub, path):
    client = hub(f"{served}{path}")
    found = client.text_classification(GOOD)
    assert [each.label for each in found] == ["pos", "neg"]
    assert sum(each.score for each in found) == pytest.approx(1, abs=1e-4)
    [best] = client.text_classification(BAD, top_k=1)
    assert best.label == "neg"
    raw = client.text_classification(GOOD, function_to_apply="none")
    shares = client.text_classification(GOOD, function_to_apply="sigmoid", top_k=1)
    assert shares[0].score == pytest.approx(1 / (1 + np.exp(-raw[0].score)), abs=1e-4)
    again = client.text_classification(GOOD, function_to_apply="softmax")
    assert [each.score for each in again] == pytest.approx([e.score for e in found], abs=1e-4)


@pytest.mark.parametrize("path", ["", "/fill-mask"])
def test_the_hub_client_fills_a_mask(served, hub, path):
    client = hub(base_url=f"{served}{path}")
    found = client.fill_mask("the [MASK] was superb")
    assert len(found) == 5
    assert found[0].score >= found[1].score > 0
    assert found[0].sequence == f"the {found[0].token_str} was superb"
    assert isinstance(found[0].token, int)
    among = client.fill_mask("the [MASK] was superb", targets=["film", "music"], top_k=5)
    assert {each.token_str for each in among} == {"film", "music"}
    assert len(client.fill_mask("the [MASK] was superb", top_k=2)) == 2


def test_the_hub_client_tags_tokens(tagging, hub):
    text = "a superb film in some town"
    found = hub(tagging).token_classification(text, aggregation_strategy="first")
    assert found and all(text[each.start : each.end] == each.word for each in found)
    group = found[0].entity_group
    others = hub(tagging).token_classification(text, ignore_labels=[group])
    assert all(each.entity_group != group for each in others)


def test_the_hub_client_shows_why_a_request_is_refused(served, hub):
    from huggingface_hub.errors import HfHubHTTPError

    with pytest.raises(HfHubHTTPError) as caught:
        hub(served).text_classification(" ")
    assert caught.value.response.status_code == 400
    assert caught.value.response.json()["error_type"] == "Empty"
    client = hub(served, provider="hf-inference")
    assert client.get_endpoint_info()["max_input_length"] == 32
    assert client.health_check()


# tritonclient ------------------------------------------------------------------------------------


@pytest.fixture
def triton(served):
    http = pytest.importorskip("tritonclient.http")
    with http.InferenceServerClient(url=served.removeprefix("http://")) as client:
        client.http = http
        yield client


def texts_for(http, texts, shape=None, binary=True):
    array = np.array(texts, dtype=object).reshape(shape or [len(texts)])
    tensor = http.InferInput("text", list(array.shape), "BYTES")
    tensor.set_data_from_numpy(array, binary_data=binary)
    return [tensor]


def name_of(triton):
    return triton.get_model_repository_index()[0]["name"]


def as_text(array):
    return [each.decode() if isinstance(each, bytes) else each for each in array.ravel()]


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_triton_s_client_classifies_texts(triton, compression, binary):
    http, texts = triton.http, [GOOD, "un très beau film 文", BAD]
    options = {
        "request_compression_algorithm": compression,
        "response_compression_algorithm": compression,
        "request_id": "7",
    }
    all_outputs = triton.infer(name_of(triton), texts_for(http, texts, binary=binary), **options)
    wanted = [http.InferRequestedOutput(name, binary_data=binary) for name in ("scores", "label")]
    inputs = texts_for(http, texts, shape=[3, 1], binary=binary)
    some = triton.infer(name_of(triton), inputs, outputs=wanted, **options)
    assert some.get_response()["id"] == "7"
    for result in (all_outputs, some):
        labels, scores = result.as_numpy("label"), result.as_numpy("scores")
        assert scores.shape == (3, 2) and scores.dtype == np.float32
        assert scores.sum(axis=1) == pytest.approx(np.ones(3), abs=1e-4)
        assert as_text(labels)[::2] == ["pos", "neg"]
    assert ("parameters" in some.get_output("scores")) == binary
    np.testing.assert_allclose(some.as_numpy("scores"), all_outputs.as_numpy("scores"), atol=1e-6)


def test_triton_s_client_reads_booleans_and_pairs(triton):
    http = triton.http
    many = triton.infer("multi_label", texts_for(http, [GOOD, BAD]))
    assert many.as_numpy("selected").shape == (2, 3)
    assert many.as_numpy("selected").dtype == np.bool_
    numbers = triton.infer("regression", texts_for(http, [GOOD]))
    assert numbers.as_numpy("scores").shape == (1, 1)
    entities = triton.infer("token_classification", texts_for(http, [GOOD]))
    assert isinstance(json.loads(as_text(entities.as_numpy("entities"))[0]), list)
    pairs = triton.infer("pairs", texts_for(http, [GOOD, BAD, BAD, BAD], shape=[2, 2]))
    assert pairs.as_numpy("scores").shape == (2, 2)


def test_triton_s_client_asks_about_models(triton):
    assert triton.is_server_live() and triton.is_server_ready()
    name = name_of(triton)
    assert triton.is_model_ready(name) and not triton.is_model_ready("other")
    index = triton.get_model_repository_index()
    assert {each["name"] for each in index} >= {name, "pairs"}
    assert {each["state"] for each in index} == {"READY"}
    version = index[0]["version"]
    assert "binary_tensor_data" in triton.get_server_metadata()["extensions"]
    metadata = triton.get_model_metadata(name, version)
    config = triton.get_model_config(name, version)
    assert [each["name"] for each in metadata["outputs"]] == ["label", "scores"]
    assert [each["data_type"] for each in config["output"]] == ["TYPE_STRING", "TYPE_FP32"]
    assert (config["name"], config["max_batch_size"]) == (name, 0)
    before = triton.get_inference_statistics(name, version)["model_stats"][0]
    triton.infer(name, texts_for(triton.http, [GOOD, BAD]), model_version=version)
    after = triton.get_inference_statistics()["model_stats"]
    assert len(after) == len(index)
    assert after[0]["inference_count"] - before["inference_count"] == 2
    assert after[0]["inference_stats"]["compute_infer"]["ns"] > 0
    assert after[0]["last_inference"] > before["last_inference"]


def test_triton_s_client_sends_requests_at_once(triton):
    name, inputs = name_of(triton), texts_for(triton.http, [GOOD])
    with triton.http.InferenceServerClient(triton._parsed_url.netloc, concurrency=4) as client:
        asked = [client.async_infer(name, inputs) for _ in range(8)]
        found = [each.get_result() for each in asked]
    assert {as_text(each.as_numpy("label"))[0] for each in found} == {"pos"}


def test_triton_s_client_shows_why_a_request_is_refused(triton):
    http = triton.http
    error, name = http.InferenceServerException, name_of(triton)
    with pytest.raises(error, match="no such classifier"):
        triton.get_model_config("other")
    with pytest.raises(error, match="no such version"):
        triton.get_model_config(name, "9")
    with pytest.raises(error, match="raybert promote"):
        triton.load_model(name)
    with pytest.raises(error, match="UTF-8"):
        triton.infer(name, texts_for(http, [b"\xff\xfe"]))
    with pytest.raises(error, match="known are label, scores"):
        triton.infer(name, texts_for(http, [GOOD]), outputs=[http.InferRequestedOutput("x")])
    number = http.InferInput("text", [1], "FP32")
    number.set_data_from_numpy(np.ones(1, np.float32))
    with pytest.raises(error, match="BYTES"):
        triton.infer(name, [number])


# kserve ------------------------------------------------------------------------------------------

_KSERVE = """
import asyncio, sys
import numpy as np
from kserve import InferInput, InferRequest, InferenceRESTClient, RESTConfig

url, name = sys.argv[1:]
texts = ["a superb moving film", "an awful boring film"]

async def main():
    client = InferenceRESTClient(RESTConfig(protocol="v2", retries=5, timeout=30))
    assert await client.is_server_ready(url) and await client.is_server_live(url)
    assert await client.is_model_ready(url, name)
    plain = InferInput("text", [2], "BYTES", data=texts)
    binary = InferInput("text", [2], "BYTES")
    binary.set_data_from_numpy(np.array(texts, dtype=object), binary_data=True)
    for given in (plain, binary):
        request = InferRequest(model_name=name, infer_inputs=[given])
        response = await client.infer(url, request, model_name=name)
        outputs = {each.name: each for each in response.outputs}
        assert response.model_name == name
        assert outputs["label"].data == ["pos", "neg"], outputs["label"].data
        assert outputs["scores"].as_numpy().shape == (2, 2)
    parameters = {"binary_data_output": True}
    request = InferRequest(model_name=name, infer_inputs=[binary], parameters=parameters)
    response = await client.infer(url, request, model_name=name)
    assert response.outputs[1].as_numpy().shape == (2, 2)
    first = InferenceRESTClient(RESTConfig(timeout=30))
    assert await first.is_model_ready(url, name)
    found = await first.infer(url, {"instances": texts}, model_name=name)
    assert [each[0]["label"] for each in found["predictions"]] == ["pos", "neg"]

asyncio.run(main())
print("done")
"""


@pytest.mark.slow
def test_kserve_s_client_classifies_texts(served):
    if not KSERVE.exists():
        pytest.skip("`make test-slow` installs kserve, in an environment of its own")
    name = _first_name(served)
    command = [KSERVE, "-c", _KSERVE, served, name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("done"), done.stderr


def test_what_kserve_s_client_sends_is_answered(served):
    """The bodies of kserve 0.21, whose client is not installed here."""
    name = _first_name(served)
    tensor = {"name": "text", "shape": [2], "datatype": "BYTES", "data": [GOOD, BAD]}
    request = {"id": "3b8e", "model_name": name, "inputs": [tensor]}
    found = _ask(f"{served}/v2/models/{name}/infer", request)
    assert (found["id"], found["model_name"]) == ("3b8e", name)
    assert found["outputs"][0]["data"] == ["pos", "neg"]
    first = _ask(f"{served}/v1/models/{name}:predict", {"instances": [GOOD, BAD]})
    assert [each[0]["label"] for each in first["predictions"]] == ["pos", "neg"]
    assert _ask(f"{served}/v1/models/{name}") == {"name": name, "ready": True}
    assert name in _ask(f"{served}/v1/models")["models"]


def _ask(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def _first_name(url):
    return _ask(f"{url}/info")["model_id"]


# curl --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--compressed"]])
def test_curl_sends_json(served, options, tmp_path):
    command = ["curl", "-sS", *options, f"{served}/predict", "--json", json.dumps({"inputs": GOOD})]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("curl is not installed")
    if "option --json" in done.stderr:
        pytest.skip("curl before 7.82 has no --json")
    assert json.loads(done.stdout)[0]["label"] == "pos"
