"""The n-gram part of a model: fitted, stored, answered with, explained."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given as given_any
from hypothesis import strategies as st
from made import TASKS as MADE
from made import spec_of, texts_of
from test_linear import read

from raybert.errors import DamagedError
from raybert.inference.classifier import TextClassifier
from raybert.inference.explanations import Explainer
from raybert.inference.ngram_attributions import ngram_shares
from raybert.storage.folder import Folder
from raybert.tasks.linear.baseline import fit_baseline
from raybert.tasks.linear.features import NgramFeatures
from raybert.tasks.linear.mixture import NgramPart, fit_part
from raybert.tasks.linear.store import load_part, save_part
from raybert.tasks.single_label import SingleLabel
from raybert.train.run import train_in_process

NAMES = [name for name in MADE if name != "token_classification"]  # it has no text features


@pytest.fixture(scope="module", params=NAMES)
def model(request, tmp_path_factory):
    """A model with an n-gram part, its labelled texts, and the baseline that it was made of."""
    name = request.param
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("mixture")
    folder = Folder(path)
    spec = spec_of(folder, name, count=300, steps=30, lr=5e-3)
    train_in_process(spec, folder / "run", on_progress=lambda record: None)
    labelled, task, _ = read(path, name, 300)
    baseline = fit_baseline(task, labelled, labelled)
    classifier = TextClassifier(folder / "run" / "model", precision="fp32")
    texts = given(MADE[name](300).rows)
    targets = baseline.predictions(labelled).targets
    encoder = classifier.logits(texts)
    part = fit_part(classifier.task, baseline.model, encoder, baseline.validation, targets)
    save_part(part, folder / "run" / "model")
    return name, folder / "run" / "model", texts, encoder, part


def given(rows):
    texts = [tuple(texts_of(row)) for row in rows]
    return [text if len(text) == 2 else text[0] for text in texts]


def test_outputs_are_the_weighted_sum_of_both_parts(model):
    _, folder, texts, encoder, part = model
    classifier = TextClassifier(folder, precision="fp32")
    linear = classifier.ngram_outputs(texts)
    expected = part.encoder_weight * encoder + part.linear_weight * linear
    np.testing.assert_allclose(classifier.logits(texts), expected, rtol=1e-4, atol=1e-4)
    assert classifier.task.fitted == part.task.fitted


def test_both_parts_are_at_least_as_likely_as_either(model):
    name, _, _, encoder, part = model
    if name == "regression":
        assert part.encoder_weight + part.linear_weight == pytest.approx(1)
    else:
        assert min(part.encoder_weight, part.linear_weight) >= 0


def test_attributions_of_both_parts_add_up_to_the_margin(model):
    _, folder, texts, _, _ = model
    classifier = TextClassifier(folder, precision="fp32")
    text = texts[0]
    found = Explainer(classifier).explain(text)
    total = sum(word.weight for word in found.words)
    assert abs(total - found.margin) <= found.error + 1e-4 * max(1, abs(found.margin))
    sides = [text] if isinstance(text, str) else text
    for word in found.words:
        assert sides[word.input][word.start : word.end] == word.text


@given_any(st.lists(st.sampled_from(["a", "b", "good film", "文字", "."]), max_size=12))
def test_shares_of_words_are_those_of_all_their_ngrams(words):
    """Of two weightings and n-grams of up to three words."""
    texts = [("a good film a b", "文字 a b"), ("b b a good", "a film 文字")] * 3
    features, rows = NgramFeatures(texts, "class", 2, 10_000), np.arange(6)
    model = features.fit(features.weightings, rows, np.arange(6) % 2)
    assert model.ngrams.longest == 3
    part = NgramPart(model, 1.0, 2.0, SingleLabel(["x", "y"]))
    pair = " ".join(words), " ".join(reversed(words))
    shares = ngram_shares(part, pair, np.int64(1))
    outputs = 2.0 * (model.outputs([pair]) - model.weights.bias)
    margin = part.task.margin(torch.from_numpy(outputs), np.int64(1))
    assert sum(share.weight for share in shares) == pytest.approx(margin.item(), abs=1e-4)


def test_words_beyond_the_models_length_have_the_weights_of_ngrams(model):
    name, folder, texts, _, _ = model
    if name == "pairs":
        pytest.skip("both texts of a pair are cut alike")
    long = " ".join([texts[0]] * 12)
    found = Explainer(TextClassifier(folder, precision="fp32")).explain(long)
    assert len(found.words) == len(long.split())
    assert [word.start for word in found.words] == sorted(word.start for word in found.words)


@pytest.mark.parametrize("damage", ["cut", "other", "gone"])
def test_damaged_files_are_one_line(tmp_path, damage):
    labelled, task, _ = read(tmp_path, "single_label", 60)
    baseline = fit_baseline(task, labelled, labelled)
    outputs = baseline.validation
    part = fit_part(task, baseline.model, outputs, outputs, baseline.predictions(labelled).targets)
    folder = Folder(tmp_path / "model")
    save_part(part, folder)
    assert load_part(folder).linear_weight == part.linear_weight
    if damage == "cut":
        data = folder.read_bytes("ngrams.safetensors")
        folder.write_bytes("ngrams.safetensors", data[: len(data) // 2])
    elif damage == "gone":
        folder.delete("ngrams.safetensors")
    else:
        described = json.loads(folder.read_text("ngrams.json"))
        folder.write_json("ngrams.json", described | {"labels": ["one"]})
    with pytest.raises(DamagedError, match=r"ngrams.json is damaged .*; delete it"):
        load_part(folder)
