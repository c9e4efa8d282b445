"""Behavioural tests: changes of texts as laws, and pass rates of models that deserve them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_directories import make_directory

from raybert.inference import text_changes as changes
from raybert.inference.behaviour import measure_behaviour
from raybert.inference.classifier import TextClassifier
from raybert.records import format_behaviour
from raybert.report.page import render
from raybert.report.stage_files import Stage
from raybert.storage.folder import Folder
from raybert.tasks.comparison import Predictions
from raybert.tasks.single_label import SingleLabel

ENGLISH = "Peter and I have seen this film, and I think that it is one of the best that there are."
TEXTS = st.text() | st.lists(
    st.sampled_from([*"a . Peter Anna movies aaaa Straße 映画".split(), ""])
).map(" ".join)


@given(TEXTS, st.integers(0, 3))
def test_typos_keep_the_letters_of_each_word_and_its_ends(text, seed):
    found = changes.with_typos(text, seed)
    assert found == changes.with_typos(text, seed) and len(found) == len(text)
    words = list(zip(text.split(), found.split(), strict=True))
    assert all(sorted(a) == sorted(b) and a[0] == b[0] and a[-1] == b[-1] for a, b in words)
    wrong = sum(a != b for a, b in words)
    assert wrong <= 1 + len(changes._INNER.findall(text)) / 20
    assert wrong or not any(len(set(w[1:-1])) > 1 for w in changes._INNER.findall(text))


@given(TEXTS)
def test_names_go_around(text):
    found = text
    for _ in range(10):
        found = changes.with_other_names(found)
        assert len(found.split()) == len(text.split())
    assert found == text


@given(TEXTS, st.sampled_from([0.25, 0.5, 0.75]))
def test_a_part_is_the_start_of_the_text_and_not_empty(text, share):
    part = changes.first_part(text, share)
    assert text.startswith(part) and bool(part) == bool(text)
    assert len(part) <= max(1, round(len(text) * share))
    assert changes.first_part(text, 1.0) == text


@given(TEXTS)
def test_another_end_changes_one_character(text):
    assert abs(len(changes.with_other_end(text)) - len(text.rstrip())) == 1


@pytest.mark.parametrize(
    ("text", "is_english"),
    [
        (ENGLISH, True),
        ("Ich habe diesen Film gesehen, und er war in jeder Minute das Geld wert.", False),
        ("Dit is een van de beste films die er is, of niet, en ik was in Parijs.", False),
        ("この映画は本当に素晴らしい", False),
        ("", False),
    ],
)
def test_english_is_recognized(text, is_english):
    assert changes.are_english([text]) is is_english


class Words:
    """A classifier by the first word it knows, with the methods that are called."""

    reads_pairs = False

    def __init__(self, labels, rule):
        self.task, self.rule = SingleLabel(labels), rule

    def outputs(self, texts):
        return np.eye(len(self.task.labels), dtype=np.float32)[[self.rule(t) for t in texts]] * 9

    def words(self, texts):
        return None


def measured(classifier, texts, targets=None):
    outputs = classifier.outputs(texts)
    targets = outputs.argmax(axis=1) if targets is None else targets
    return measure_behaviour(classifier, texts, Predictions(classifier.task, outputs, targets), 100)


def test_a_model_of_names_and_words_without_negation_fails_these_tests():
    """It answers by the name, and by whether the text holds praise."""
    texts = [f"{ENGLISH} It is number {i}." for i in range(40)]
    classifier = Words(["neg", "pos", "Neutral"], lambda t: int("Peter" in t or "good" in t))
    found = measured(classifier, texts)
    rates = {test["name"]: test["passed"] for test in found["tests"]}
    assert rates["other names"] == 0 and rates["last punctuation mark"] == 1
    assert rates["neutral sentence added"] == 1
    assert rates["lower case"] == 0
    assert rates["negated praise"] == 0.75  # of four templates one has "good"
    assert rates["negated blame"] == 0 and rates["neutral sentences"] == 0
    assert rates["negated praise added"] == rates["praise added"] == 1
    [names] = [test for test in found["tests"] if test["name"] == "other names"]
    assert names["failed"].startswith("Paul") and names["texts"] == 40
    assert found == measured(classifier, texts)  # seeds are fixed


def test_labels_that_are_no_sentiments_have_no_sentences():
    classifier = Words(["sport", "politics"], lambda t: 0)
    kinds = {t["kind"] for t in measured(classifier, [ENGLISH + str(i) for i in range(9)])["tests"]}
    assert kinds == {"invariance"}
    german = [f"Der Film war gut, und Peter schlief. Nummer {i}" for i in range(9)]
    names = [t["name"] for t in measured(Words(["neg", "pos"], lambda t: 0), german)["tests"]]
    assert names == ["typos", "lower case", "last punctuation mark"]


def test_a_model_that_reads_the_end_loses_with_each_cut():
    classifier = Words(["a", "b"], lambda t: int(t.endswith("b")))
    texts = [f"{'word ' * 20}{'ab'[i % 2]}" for i in range(20)]
    found = measured(classifier, texts)
    assert [row["score"] for row in found["truncated"]] == [0.5, 0.5, 0.5, 1.0]
    assert "25% 0.5000" in format_behaviour(found, "accuracy")
    scores = {"task": "single_label", "metric": "accuracy", "behaviour": found}
    page = render("a run", [Stage("evaluate", scores=scores)])
    assert "Texts that are cut" in page and "typos" in page and "damaged" not in page


@pytest.mark.parametrize("name", ["multi_label", "regression", "token_classification", "pairs"])
def test_models_of_every_task_are_tested(tmp_path, name):
    folder = Folder(tmp_path)
    make_directory(folder, name)
    classifier = TextClassifier(folder / "model", precision="fp32")
    texts = [f"{ENGLISH} Number {i}" for i in range(8)]
    texts = [(text, text) for text in texts] if classifier.reads_pairs else texts
    outputs = classifier.outputs(texts)
    targets = classifier.task.no_targets(8) if not classifier.task.is_per_token else [[]] * 8
    if name in ("regression", "multi_label"):
        targets = np.ones_like(outputs)
    elif name == "pairs":
        targets = np.zeros(8, np.int64)
    found = measure_behaviour(classifier, texts, Predictions(classifier.task, outputs, targets), 8)
    assert [t["name"] for t in found["tests"]][:4] == [
        "typos", "lower case", "last punctuation mark", "other names"
    ]  # fmt: skip
    assert all(0 <= test["passed"] <= 1 for test in found["tests"])
    assert len(found["truncated"]) == (0 if classifier.task.is_per_token else 4)
    words = classifier.words(texts)
    assert classifier.task.same_answers(outputs, outputs, (words, words)).all()
