"""Attributions: they sum to the margin, and the words that determine the label have the largest."""

import numpy as np
import pytest
import torch
from making import GOOD, reviews

from raybert.inference import explanations
from raybert.inference.classifier import TextClassifier
from raybert.inference.explanations import TOLERANCE, Explainer, _character_offsets

POS = 1
TEXTS = [text for text, _ in reviews(12, seed=9)] + ["superb", "zzz unknown zzz"]


@pytest.fixture(scope="module")
def classifier(model):
    torch.set_num_threads(1)
    return TextClassifier(model, precision="fp32")


@pytest.fixture(scope="module")
def explainer(classifier):
    return Explainer(classifier)


@pytest.mark.parametrize("text", TEXTS)
def test_weights_sum_to_the_margin_within_the_returned_error(explainer, text):
    found = explainer.explain(text)
    total = sum(word.weight for word in found.words)
    assert abs(total - found.margin) == pytest.approx(found.error, abs=1e-6)
    assert found.error <= TOLERANCE * max(1.0, abs(found.margin))


def test_the_margin_is_the_difference_of_logits_from_the_masked_text(classifier, explainer):
    text = "the film was superb"
    found = explainer.explain(text, POS)
    masked = " ".join([classifier.tokenizer.mask_token] * 4)
    [here], [there] = (
        classifier.score([ids])
        for ids in (
            classifier.tokenizer.encode([text]).values,
            classifier.tokenizer.encode_masked(masked),
        )
    )
    assert found.label == "pos"
    assert found.margin == pytest.approx((here[1] - here[0]) - (there[1] - there[0]), abs=1e-3)


def test_more_steps_reduce_the_error(explainer, monkeypatch):
    text = "a delightful film with superb music"
    errors = []
    for steps in ((2,), (96,)):
        monkeypatch.setattr(explanations, "STEPS", steps)
        errors.append(explainer.explain(text).error)
    assert errors[1] < errors[0]


def test_the_number_of_steps_is_bounded_for_long_texts(explainer, monkeypatch):
    monkeypatch.setattr(explanations, "TOLERANCE", -1.0)
    monkeypatch.setattr(explanations, "_MAX_TOKENS", 48 * 32)
    taken = []
    attribute = explainer._attributions
    monkeypatch.setattr(
        explainer, "_attributions", lambda *args: taken.append(args[-1]) or attribute(*args)
    )
    for words in (4, 30):
        explainer.explain("film " * words)
    assert taken == [24, 48, 96, 24, 48]


def test_the_word_that_determines_the_label_has_the_largest_weight(explainer):
    for word in GOOD:
        found = explainer.explain(f"the film had {word} music", POS)
        assert max(found.words, key=lambda one: one.weight).text == word


def test_word_offsets_refer_to_the_raw_text(explainer):
    text = "A  superb,<br /><BR>clumsy\tFILM "
    found = explainer.explain(text)
    assert [word.text for word in found.words] == ["A", "superb", "clumsy", "FILM"]
    assert all(text[word.start : word.end] == word.text for word in found.words)


@pytest.mark.parametrize(
    "text", ["plain", "<br>", "a<br/>b", "x < br / > y<br><br>", "<br>a", "a<br", "ü<br />ü"]
)
def test_character_offsets_map_the_cleaned_text_to_the_raw_one(classifier, text):
    cleaned = classifier.preprocessing.clean(text)
    offsets = _character_offsets(text, cleaned)
    assert len(offsets) == len(cleaned) + 1
    assert offsets == sorted(offsets) and offsets[-1] == len(text)
    for at, character in enumerate(cleaned):
        if character != " ":
            assert text[offsets[at]] == character


def test_words_cut_out_of_a_long_text_have_no_weight(classifier, explainer):
    words = ["film"] * 100
    words[0], words[50], words[-1] = "superb", "awful", "music"
    found = explainer.explain(" ".join(words))
    assert len(found.words) == classifier.longest - 2
    assert {"superb", "music"} <= {word.text for word in found.words}
    assert "awful" not in {word.text for word in found.words}


def test_explaining_does_not_change_the_classifier(classifier, explainer):
    before = classifier.logits(TEXTS)
    explainer.explain(TEXTS[0])
    np.testing.assert_array_equal(classifier.logits(TEXTS), before)
    assert not any(parameter.requires_grad for parameter in classifier.model.parameters())
