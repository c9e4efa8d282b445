"""Every task over HTTP: answers, pairs, explanations, tensors, metadata, the document."""

import json

import pytest
import torch
from made import TASKS as MADE
from made import spec_of, texts_of
from test_api import Api

from raybert.inference.classifier import TextClassifier
from raybert.storage.folder import Folder
from raybert.tasks.protocol import AnswerOptions
from raybert.tasks.registry import TASKS
from raybert.train.run import train_in_process


@pytest.fixture(scope="module", params=list(MADE))
def served(request, tmp_path_factory, pretrained):
    """A served model of each task: the task's name, the application, a classifier, texts."""
    torch.set_num_threads(1)
    folder = Folder(tmp_path_factory.mktemp("served"))
    spec = spec_of(folder, request.param, steps=40, lr=5e-3)
    train_in_process(spec, folder / "run", on_progress=lambda record: None)
    model = folder / "run" / "model"
    api = Api(model, pretrained)
    texts = [texts_of(row) for row in MADE[request.param](6, seed=3).rows]
    yield request.param, api, TextClassifier(model, precision="fp32"), texts
    api.service.close()


def inputs_of(texts):
    return [text if len(text) == 2 else text[0] for text in texts]


def test_predict_gives_the_tasks_answers(served):
    _, api, classifier, texts = served
    given = [tuple(text) if len(text) == 2 else text[0] for text in texts]
    response = api.post("/predict", {"inputs": inputs_of(texts)})
    assert response.status_code == 200, response.text
    assert response.json() == classifier.answers(given, AnswerOptions())
    one = api.post("/predict", {"inputs": inputs_of(texts)[0]})
    assert one.json() == response.json()[0]


def test_answers_fit_their_schema(served):
    _, api, classifier, texts = served
    schema = classifier.task.answer_schema()
    for answer in api.post("/predict", {"inputs": inputs_of(texts)}).json():
        for element in answer:
            schema.model_validate(element, strict=True)


def test_the_document_has_each_tasks_schema(served):
    _, api, _, _ = served
    schemas = api.ask("GET", "/openapi.json").json()["components"]["schemas"]
    assert {task.answer_schema().__name__ for task in TASKS.values()} <= set(schemas)


def test_top_k_and_threshold_shorten_answers(served):
    _, api, _, texts = served
    full = api.post("/predict", {"inputs": inputs_of(texts)}).json()
    short = api.post("/predict", {"inputs": inputs_of(texts), "top_k": 1}).json()
    assert all(len(one) == min(1, len(every)) for one, every in zip(short, full, strict=True))
    certain = api.post("/predict", {"inputs": inputs_of(texts), "threshold": 0.5})
    assert certain.status_code == 200
    assert api.post("/predict", {"inputs": inputs_of(texts), "top_k": 0}).status_code == 422


def test_words_are_explained(served):
    name, api, _, texts = served
    response = api.post("/predict", {"inputs": inputs_of(texts)[0], "explain": True})
    assert response.status_code == 200, response.text
    explained = response.json()
    assert explained["label"] and explained["words"]
    assert {word["input"] for word in explained["words"]} <= ({0, 1} if name == "pairs" else {0})


def test_info_and_metadata_say_what_is_answered(served):
    name, api, classifier, texts = served
    info = api.ask("GET", "/info").json()
    assert info["task"] == classifier.task.name
    assert info["reads_pairs"] == (name == "pairs")
    metadata = api.ask("GET", f"/v2/models/{info['model_id']}").json()
    assert metadata["inputs"][0]["shape"] == ([-1, 2] if name == "pairs" else [-1])
    flat = [part for text in texts for part in text]
    shape = [len(texts), 2] if name == "pairs" else [len(texts)]
    tensor = {"name": "text", "shape": shape, "datatype": "BYTES", "data": flat}
    response = api.post(f"/v2/models/{info['model_id']}/infer", {"inputs": [tensor]})
    assert response.status_code == 200, response.text
    outputs = response.json()["outputs"]
    assert [o["name"] for o in outputs] == [o["name"] for o in metadata["outputs"]]
    for output, promised in zip(outputs, metadata["outputs"], strict=True):
        assert output["datatype"] == promised["datatype"]
        assert output["shape"] == [len(texts), *promised["shape"][1:]]
        assert len(output["data"]) == torch.Size(output["shape"]).numel()
    json.dumps(outputs)


def test_inputs_of_another_form_are_one_line(served):
    name, api, _, _ = served
    wrong = (
        ["a text", ["a", "b", "c"], [["a", "b"], ["c"]]]
        if name == "pairs"
        else [[["a", "b"]], [["a", "b"], ["c", "d"]]]
    )
    for inputs in wrong:
        response = api.post("/predict", {"inputs": inputs})
        assert response.status_code == 422, inputs
        assert "inputs" in response.json()["error"] and "\n" not in response.json()["error"]


def test_a_pair_and_a_list_of_pairs_differ(served):
    name, api, _, _ = served
    response = api.post("/predict", {"inputs": ["a team", "the goal"]}).json()
    if name == "pairs":
        assert isinstance(response[0], dict)
        many = api.post("/predict", {"inputs": [["a team", "the goal"]]}).json()
        assert many == [response]
    else:
        assert len(response) == 2 and all(isinstance(each, list) for each in response)
