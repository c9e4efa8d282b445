"""A served model with an n-gram part: its answers and explanations are those of both parts."""

import pyarrow as pa
import pytest
import torch
from made import single_label, spec_of
from test_api import Api

from raybert.inference.classifier import TextClassifier
from raybert.inference.explanations import Explainer
from raybert.storage.folder import Folder
from raybert.tasks.labelled import Labelled
from raybert.tasks.linear.baseline import fit_baseline
from raybert.tasks.linear.mixture import fit_part
from raybert.tasks.linear.store import save_part
from raybert.tasks.protocol import AnswerOptions
from raybert.train.run import train_in_process


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    folder = Folder(tmp_path_factory.mktemp("ngrams"))
    spec = spec_of(folder, "single_label", steps=4)
    train_in_process(spec, folder / "run", on_progress=lambda record: None)
    model = folder / "run" / "model"
    classifier = TextClassifier(model, precision="fp32")
    columns = zip(*((row["text"], row["label"]) for row in single_label(300).rows), strict=True)
    texts, labels = (pa.chunked_array([column]) for column in columns)
    labelled = Labelled(texts, labels, None, None, {})
    baseline = fit_baseline(classifier.task, labelled, labelled)
    encoder, linear = classifier.logits(texts.to_pylist()), baseline.validation
    targets = baseline.predictions(labelled).targets
    save_part(fit_part(classifier.task, baseline.model, encoder, linear, targets), model)
    return model


def test_a_server_answers_and_explains_with_both_parts(folder, pretrained):
    api, classifier = Api(folder, pretrained), TextClassifier(folder, precision="fp32")
    texts = [row["text"] for row in single_label(8, seed=2).rows]
    try:
        found = api.post("/predict", {"inputs": texts}).json()
        assert found == classifier.answers(texts, AnswerOptions())
        explained = api.post("/predict", {"inputs": texts[0], "explain": True}).json()
        label = classifier.labels.index(found[0][0]["label"])
        expected = Explainer(classifier).explain(texts[0], label)
        assert [word["weight"] for word in explained["words"]] == pytest.approx(
            [word.weight for word in expected.words], abs=1e-4
        )
    finally:
        api.service.close()
