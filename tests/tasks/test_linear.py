"""The linear baseline: of every task, near the best score, the same after it was stored."""

import json
import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import TASKS as MADE

from raybert.data.sources.settings import SourceConfig
from raybert.storage.folder import Folder
from raybert.tasks.comparison import Predictions, paired_difference
from raybert.tasks.labelled import Labelled, read_labelled, resolve_source
from raybert.tasks.linear.baseline import (
    Baseline,
    beside_baseline,
    fit_baseline,
    strings,
    targets_of,
)
from raybert.tasks.linear.features import NgramFeatures
from raybert.tasks.linear.ngrams import Ngrams
from raybert.tasks.linear.store import load_baseline, save_baseline
from raybert.tasks.regression import Regression
from raybert.tasks.single_label import SingleLabel

#: Of the best score. Whether two texts share a topic is no sum over their words.
SHARE = {"pairs": 0.55}


def read(folder, name, count, seed=0):
    """Labelled texts of a generator, their task, and the generator's best score."""
    made = MADE[name](count, seed=seed)
    path = folder / f"{name}-{seed}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made.rows))
    resolved = resolve_source(SourceConfig(path=str(path), **made.source))
    texts = read_labelled(resolved.source, resolved.task)
    names = resolved.task.find_labels(texts.labels.unique().to_pylist(), resolved.source)
    return texts, resolved.task(names), made


@pytest.mark.parametrize("name", MADE)
def test_it_is_near_the_best_score_of_every_task(tmp_path, name):
    train, task, _ = read(tmp_path, name, 1200)
    validation = read(tmp_path, name, 200, seed=1)[0]
    test, _, made = read(tmp_path, name, 400, seed=2)
    fitted = fit_baseline(task, train, validation)
    found = fitted.predictions(test)
    assert fitted.task.evaluate(found.outputs, found.targets)[made.metric] >= (
        SHARE.get(name, 0.95) * made.best
    )
    save_baseline(fitted, Folder(tmp_path / "kept"))
    again = load_baseline(Folder(tmp_path / "kept"))
    assert again.task.fitted == fitted.task.fitted and again.description == fitted.description
    for one, other in zip(again.predictions(test).outputs, found.outputs, strict=True):
        np.testing.assert_array_equal(one, other)
    beside = beside_baseline(again.predictions(test), fitted, test)
    assert beside["difference"] == 0 and beside["interval"] == [0, 0]


def test_nothing_stored_is_no_baseline(tmp_path):
    assert load_baseline(Folder(tmp_path)) is None


@given(st.lists(st.text(max_size=30), min_size=1, max_size=8), st.integers(2, 100))
def test_any_texts_can_be_fitted(texts, num_outputs):
    """Empty texts, no word at all, one class only, more outputs than texts."""
    targets = np.arange(len(texts)) % num_outputs
    rows = [(text,) for text in texts]
    for kind, wanted in (("class", targets), ("number", targets[:, None].astype(np.float32))):
        features = NgramFeatures(rows, kind, num_outputs if kind == "class" else 1)
        fitted, later = np.arange(len(rows)), features.extend([("unseen words",)])
        for model in features.fit_candidates(fitted, wanted):
            outputs = model.outputs([*rows, ("unseen words",)])
            known = features.outputs(model, np.concatenate([fitted, later]))
            np.testing.assert_allclose(known, outputs, rtol=1e-4, atol=1e-5)
            assert outputs.dtype == np.float32 and np.isfinite(outputs).all()
            assert outputs.shape == (len(texts) + 1, num_outputs if kind == "class" else 1)


def test_a_sum_of_models_adds_their_outputs_and_is_stored(tmp_path):
    train, task, _ = read(tmp_path, "single_label", 300)
    texts, targets = strings(train), targets_of(task, train)
    features, rows = NgramFeatures(texts, "class", len(task.labels)), np.arange(len(texts))
    alone = [features.fit((kind,), rows, targets) for kind in features.weightings]
    both = features.fit(features.weightings, rows, targets)
    expected = sum(model.outputs(texts) for model in alone)
    np.testing.assert_allclose(both.outputs(texts), expected, rtol=1e-4, atol=1e-4)
    save_baseline(Baseline(task, both, {}, 0.0), Folder(tmp_path / "kept"))
    again = load_baseline(Folder(tmp_path / "kept")).model
    np.testing.assert_array_equal(again.outputs(texts), both.outputs(texts))


def test_a_model_that_is_fitted_again_knows_the_validation_texts_but_is_scored_without_them():
    both = ["sublime dismal"]
    train = labelled(["good"] * 8 + ["bad"] * 8 + both * 2, ["a"] * 8 + ["b"] * 8 + ["a", "b"])
    unseen = labelled(["sublime", "dismal"] * 10, ["a", "b"] * 10)
    task = SingleLabel(["a", "b"])
    before, after = (fit_baseline(task, train, unseen, refit=refit) for refit in (False, True))
    assert before.metrics == after.metrics and before.metrics["accuracy"] == 0.5
    assert before.model.ngrams.index == after.model.ngrams.index
    np.testing.assert_array_equal(before.validation, after.validation)
    assert after.predictions(unseen).outputs.argmax(1).tolist() == [0, 1] * 10


@given(st.lists(st.text("ab ,ไทย漢字", max_size=12), min_size=1, max_size=6))
def test_counts_of_training_texts_are_those_of_later_ones(texts):
    rows = [(text,) for text in texts]
    ngrams, counts = Ngrams.fit(rows, 1000)
    assert (counts != ngrams.counts(rows)).nnz == 0


def test_texts_without_spaces_have_ngrams_of_characters():
    ngrams, _ = Ngrams.fit([("漢字かな",), ("ภาษาไทย",), ("two words",)], 1000)
    assert {"漢", "漢 字", "ไ ท", "words", "two words"} <= ngrams.index.keys()


def test_rows_without_a_label_are_left_out(tmp_path):
    train, task, _ = read(tmp_path, "single_label", 300)
    unlabelled = train._replace(
        texts=pa.chunked_array([*train.texts.chunks, pa.array(["painting"] * 100)]),
        labels=pa.chunked_array([*train.labels.chunks, pa.nulls(100, pa.string())]),
    )
    ours, theirs = (fit_baseline(task, texts, train) for texts in (train, unlabelled))
    assert ours.metrics == theirs.metrics


def test_few_labels_count_for_words_that_only_unlabelled_texts_join():
    """A word of an unlabelled text that goes with those of a label has that label."""
    draw = random.Random(0)
    topics = {"a": ["oboe", "viola", "cello", "flute"], "b": ["lemon", "olive", "apple", "grape"]}

    def text(topic, words):
        return " ".join(draw.choices(topics[topic][:words], k=6))

    train = labelled([text(t, 2) for t in "abab"], ["a", "b"] * 2)
    unlabelled = [text(t, 4) for t in "ab" * 100]
    unseen = [f"{topics[t][2]} {topics[t][3]}" for t in "ab"]
    task, texts = SingleLabel(["a", "b"]), labelled(unseen, ["a", "b"])
    alone, joined = (fit_baseline(task, train, texts, unlabelled=u) for u in ((), unlabelled))
    assert alone.model.weightings != joined.model.weightings == ("latent semantic analysis",)
    assert np.ptp(alone.predictions(texts).outputs, axis=0).max() == 0  # it knows none of the words
    assert joined.predictions(texts).outputs.argmax(1).tolist() == [0, 1]


@pytest.mark.parametrize("better", [0, 1])
def test_the_interval_excludes_zero_where_a_model_is_much_better(better):
    draw = np.random.default_rng(0)
    targets = draw.integers(0, 2, 500)
    good, bad = np.eye(2)[targets], np.eye(2)[draw.integers(0, 2, 500)]
    task = SingleLabel(["a", "b"])
    models = [Predictions(task, outputs, targets) for outputs in (good, bad)]
    found = paired_difference(models[better], models[1 - better])
    assert found.low <= found.value <= found.high
    assert (found.low > 0) == (better == 0) and (found.high < 0) == (better == 1)


def test_models_that_err_equally_often_have_no_certain_difference():
    targets = np.arange(500) % 2
    wrong = [np.arange(500) < 50, (np.arange(500) >= 50) & (np.arange(500) < 100)]
    task = SingleLabel(["a", "b"])
    models = [Predictions(task, np.eye(2)[targets ^ rows], targets) for rows in wrong]
    found = paired_difference(*models)
    assert found.value == 0 and found.low < 0 < found.high


@pytest.mark.parametrize("name", MADE)
def test_parts_of_a_ratio_add_up_to_the_default_metric(tmp_path, name):
    train, task, _ = read(tmp_path, name, 200)
    found = fit_baseline(task, train, train).predictions(train)
    parts = found.task.ratio_parts(found.outputs, found.targets)
    expected = found.task.validate(found.outputs, found.targets)[task.default_metric]
    if parts is not None:
        assert parts[:, 0].sum() / parts[:, 1].sum() == pytest.approx(expected)
    else:
        assert name == "regression"  # a root of a mean


def test_an_error_is_better_where_it_is_smaller():
    task = Regression(["value"])
    truth = np.linspace(0, 1, 50, dtype=np.float32)[:, None]
    good, bad = (Predictions(task, truth + error, truth) for error in (0.01, 0.5))
    assert paired_difference(good, bad).low > 0


def labelled(texts, labels):
    return Labelled(pa.chunked_array([texts]), pa.chunked_array([labels]), None, None, {})


def test_a_class_without_training_text_can_be_scored():
    texts = labelled(["good film", "bad film"] * 20, ["a", "b"] * 20)
    fitted = fit_baseline(SingleLabel(["a", "b", "c"]), texts, labelled(["good"], ["c"]))
    assert fitted.predictions(texts).outputs.shape == (40, 3)
