"""A text's scores are the same alone, in any batch and in any order."""

import io
import os

import numpy as np
import pytest
import safetensors.torch
from making import reviews
from model_directories import make_directory

from raybert.errors import DataError, RaybertError
from raybert.inference.classifier import TextClassifier, round_up
from raybert.model import huggingface
from raybert.pipeline.predict_stage import number_texts, predict_texts, read_lines
from raybert.storage.folder import Folder
from raybert.tasks.categorical import softmax

TEXTS = [text for text, _ in reviews(40, seed=3)] + ["superb " * 100, "awful", "zzz unknown zzz"]


def test_scores_do_not_depend_on_the_batch_or_its_order(model):
    classifier = TextClassifier(model, precision="fp32")
    together = classifier.logits(TEXTS)
    alone = np.concatenate([classifier.logits([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(classifier.logits(TEXTS[::-1])[::-1], together, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 40, 10_000])
def test_scores_do_not_depend_on_the_batch_size(model, tokens):
    classifier = TextClassifier(model, precision="fp32")
    expected = classifier.logits(TEXTS)
    classifier.tokens_per_batch = tokens
    np.testing.assert_allclose(classifier.logits(TEXTS), expected, atol=1e-5)


def test_padded_and_concatenated_batches_have_equal_scores(model, monkeypatch):
    classifier = TextClassifier(model, precision="fp32")
    concatenated = classifier.logits(TEXTS)
    # As on GPUs.
    monkeypatch.setattr(classifier, "_concatenates", False)
    np.testing.assert_allclose(classifier.logits(TEXTS), concatenated, atol=1e-5)


@pytest.mark.parametrize("concatenates", [True, False])
def test_batches_do_not_exceed_the_token_budget(model, monkeypatch, concatenates):
    classifier = TextClassifier(model, precision="fp32")
    batches = []
    forward = classifier._forward

    def record(rows):
        batches.append([len(row) for row in rows])
        return forward(rows)

    monkeypatch.setattr(classifier, "_forward", record)
    monkeypatch.setattr(classifier, "_concatenates", concatenates)
    classifier.tokens_per_batch = 64
    classifier.logits(TEXTS)
    costs = [sum(b) if concatenates else len(b) * max(b) for b in batches]
    assert sum(map(len, batches)) == len(TEXTS)
    assert all(cost <= 64 or len(b) == 1 for cost, b in zip(costs, batches, strict=True))
    assert len(batches) < len(TEXTS)
    lengths = [length for batch in batches for length in batch]
    assert lengths == sorted(lengths)


def test_an_empty_row_has_finite_scores(model):
    classifier = TextClassifier(model)
    rows = [np.empty(0, np.uint16), *classifier.encode(["superb"])]
    assert np.isfinite(classifier.score(rows)).all()


def test_windows_read_the_middle_that_truncation_leaves_out(model):
    classifier = TextClassifier(model, precision="fp32")
    words = ["film"] * 200
    words[100] = "superb"
    plain, hidden = (classifier.encode_windows([" ".join(w)])[0] for w in (["film"] * 200, words))
    assert all(len(row) == classifier.longest for row in hidden)
    difference = abs(classifier.score(hidden) - classifier.score(plain))
    assert difference.max() > 1e-3
    short, lengths = classifier.encode_windows(["a superb film"])
    assert lengths == [len(short[0])]
    assert [row.tolist() for row in short] == [
        row.tolist() for row in classifier.encode(["a superb film"])
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_probabilities_are_the_softmax_of_the_logits(model, precision):
    """The temperature is in the weights, whatever they are computed in."""
    classifier = TextClassifier(model, precision=precision)
    assert classifier.calibrated_temperature not in (None, 1.0)
    assert huggingface.read_temperature(model) == 1.0
    expected = softmax(classifier.logits(TEXTS))
    np.testing.assert_allclose(classifier.probabilities(TEXTS), expected, atol=1e-6)


def test_a_model_with_a_temperature_in_its_configuration_gives_the_same(model, tmp_path):
    """As earlier releases wrote it: the weights of training, and the temperature beside them."""
    old, classifier = Folder(tmp_path), TextClassifier(model, precision="fp32")
    temperature = classifier.calibrated_temperature
    model.copy_to(old, last="config.json")
    tensors = safetensors.torch.load(model.read_bytes("model.safetensors"))
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] = tensors[name] * temperature
    old.write_bytes("model.safetensors", safetensors.torch.save(tensors))
    config = old.read_json("config.json")
    del config["raybert"]["calibrated_temperature"]
    config["raybert"]["temperature"] = temperature
    config["raybert"]["task"]["fitted"]["temperature"] = temperature
    old.write_json("config.json", config)
    again = TextClassifier(old, precision="fp32")
    assert huggingface.read_temperature(old) == again.calibrated_temperature == temperature
    np.testing.assert_allclose(again.logits(TEXTS), classifier.logits(TEXTS), atol=1e-5)
    np.testing.assert_allclose(
        again.probabilities(TEXTS), classifier.probabilities(TEXTS), atol=1e-6
    )
    del config["raybert"]["task"]  # before there were tasks
    old.write_json("config.json", config)
    again = TextClassifier(old, precision="fp32")
    np.testing.assert_allclose(
        again.probabilities(TEXTS), classifier.probabilities(TEXTS), atol=1e-6
    )


def test_probabilities_sum_to_one_and_are_highest_for_the_right_label(model):
    classifier = TextClassifier(model)
    assert classifier.labels == ["neg", "pos"]
    probabilities = classifier.probabilities(["a superb moving film", "a dreadful clumsy film"])
    assert probabilities.sum(1) == pytest.approx([1, 1])
    assert probabilities.argmax(1).tolist() == [1, 0]


def test_html_line_breaks_are_read_as_spaces(model):
    classifier = TextClassifier(model, precision="fp32")
    np.testing.assert_allclose(
        classifier.logits(["superb<br /><BR>film"]), classifier.logits(["superb  film"]), atol=1e-6
    )


def test_a_text_past_the_length_keeps_its_head_and_tail(model):
    classifier = TextClassifier(model, precision="fp32")
    words = ["film"] * 200
    middle = [*words[:100], "superb", *words[101:]]
    tail = [*words[:-1], "superb"]
    plain, hidden, seen = classifier.logits([" ".join(t) for t in (words, middle, tail)])
    assert classifier.preprocessing.seq_len == 32
    np.testing.assert_allclose(hidden, plain, atol=1e-6)
    assert abs(seen - plain).max() > 1e-3


def test_without_texts_there_are_no_scores(model):
    assert TextClassifier(model).logits([]).shape == (0, 2)
    assert list(predict_texts(model, [])) == []


def test_predictions_are_yielded_before_the_last_text_is_read(model):
    taken = []

    def texts():
        for index in range(1000):
            taken.append(index)
            yield "superb film"

    predictions = predict_texts(model, number_texts(texts()))
    first = next(predictions)
    assert first["label"] == "pos"
    assert len(taken) < 1000
    predictions.close()


def test_empty_lines_are_skipped():
    found = list(read_lines(io.BytesIO(b"a\n  \n\n" + "ü\r\nlast".encode())))
    assert found == [[(0, "a"), (3, "ü")], [(4, "last")]]
    assert list(read_lines(io.BytesIO(b""))) == list(read_lines(io.BytesIO(b"\n\n"))) == []


def test_lines_of_any_length_are_read_whole_and_in_order():
    texts = [str(n) * (n % 700) for n in range(2000)] + ["x" * 300_000, "end"]
    found = list(read_lines(io.BytesIO("\n".join(texts).encode())))
    assert [item for batch in found for item in batch] == [
        (row, text) for row, text in enumerate(texts) if text
    ]


def test_a_line_is_predicted_before_the_next_one_arrives(model):
    reading, writing = os.pipe()
    with open(reading, "rb") as stream, open(writing, "wb", buffering=0) as sender:
        predictions = predict_texts(model, read_lines(stream))
        for row, label in ((0, "pos"), (2, "neg")):
            sender.write(b"superb film\n" if label == "pos" else b"\nawful film\n")
            found = next(predictions)  # would block if it read ahead
            assert (found["row"], found["label"]) == (row, label)
        sender.close()
        assert list(predictions) == []


def test_lines_before_a_bad_one_are_yielded():
    found = read_lines(io.BytesIO(b"good\nb\xffd\n"))
    assert next(found) == [(0, "good")]
    with pytest.raises(DataError, match="line 2 is not UTF-8"):
        next(found)


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(RaybertError):
        TextClassifier(Folder(tmp_path))


def test_warming_up_scores_a_full_batch_of_two_lengths(model, monkeypatch):
    """Loops compiled for a few tokens would run on one core."""
    classifier, rows = TextClassifier(model, precision="fp32"), []
    monkeypatch.setattr(classifier, "score", lambda given: rows.extend(given) or np.zeros((1, 2)))
    classifier.warm()
    tokens = sum(map(len, rows))
    assert classifier.tokens_per_batch - classifier.longest < tokens <= classifier.tokens_per_batch
    assert len(set(map(len, rows))) == 2


def test_batch_lengths_are_few_and_little_longer_than_the_texts():
    lengths = np.array([round_up(tokens) for tokens in range(1, 2049)])
    tokens = np.arange(1, 2049)
    assert (lengths >= tokens).all() and (np.diff(lengths) >= 0).all()
    assert (lengths - tokens < np.maximum(16, tokens / 16)).all()
    assert len(set(lengths)) <= 64


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_filler_rows_have_no_scores_and_change_none(model, monkeypatch, count):
    classifier = TextClassifier(model, precision="fp32")
    expected = classifier.logits(TEXTS)[:count]
    seen = []
    compute = classifier._compute

    def record(ids, mask, lengths):
        seen.append((ids.shape[1], lengths))
        return compute(ids, mask, lengths)

    monkeypatch.setattr(classifier, "_compute", record)
    monkeypatch.setattr(classifier, "longest", 7)  # shorter than the filler
    rows = classifier.encode(TEXTS[:count])
    np.testing.assert_allclose(classifier._forward(rows), expected, atol=1e-5)
    [(length, lengths)] = seen
    assert length == sum(lengths) == round_up(sum(map(len, rows)))
    assert lengths[:count] == [len(row) for row in rows] and max([0, *lengths[count:]]) <= 7


def test_the_temperature_of_both_parts_is_in_their_weights(tmp_path):
    make_directory(Folder(tmp_path), "ngrams")
    classifier = TextClassifier(Folder(tmp_path) / "model", precision="fp32")
    assert "temperature" not in classifier.task.fitted
    encoder = classifier.score(classifier.encode(TEXTS))
    linear = classifier.ngrams.model.outputs([(text,) for text in TEXTS])
    expected = (0.5 * encoder + 1.5 * linear) / 2.0
    np.testing.assert_allclose(classifier.logits(TEXTS), expected, atol=1e-6)
    np.testing.assert_allclose(classifier.probabilities(TEXTS), softmax(expected), atol=1e-6)
