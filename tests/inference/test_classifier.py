"""Answers do not depend on company: a text alone, in a batch or in any order scores the same."""

import io
import os

import numpy as np
import pytest
from making import reviews

from raybert.errors import DataError, RaybertError
from raybert.inference.classifier import TextClassifier, round_up, softmax
from raybert.model import huggingface
from raybert.pipeline.predict_stage import lines, numbered, predict_texts
from raybert.storage.folder import Folder

TEXTS = [text for text, _ in reviews(40, seed=3)] + ["superb " * 100, "awful", "zzz unknown zzz"]


def test_scores_do_not_depend_on_company_or_order(model):
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


def test_padded_batches_score_as_packed_ones(model, monkeypatch):
    """On GPUs texts are padded."""
    classifier = TextClassifier(model, precision="fp32")
    packed = classifier.logits(TEXTS)
    monkeypatch.setattr(TextClassifier, "_is_packed", False)
    np.testing.assert_allclose(classifier.logits(TEXTS), packed, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_batches_keep_to_the_token_budget(model, monkeypatch, packed):
    classifier = TextClassifier(model, precision="fp32")
    batches = []
    forward = classifier._forward

    def note(rows):
        batches.append([len(row) for row in rows])
        return forward(rows)

    monkeypatch.setattr(classifier, "_forward", note)
    monkeypatch.setattr(TextClassifier, "_is_packed", packed)
    classifier.tokens_per_batch = 64
    classifier.logits(TEXTS)
    costs = [sum(b) if packed else len(b) * max(b) for b in batches]
    assert sum(map(len, batches)) == len(TEXTS)
    assert all(cost <= 64 or len(b) == 1 for cost, b in zip(costs, batches, strict=True))
    assert len(batches) < len(TEXTS)
    lengths = [length for batch in batches for length in batch]
    assert lengths == sorted(lengths)


def test_a_text_of_which_nothing_is_left_has_a_score(model):
    classifier = TextClassifier(model)
    rows = [np.empty(0, np.uint16), *classifier.encode(["superb"])]
    assert np.isfinite(classifier.score(rows)).all()


def test_windows_cover_what_cutting_leaves_out(model):
    classifier = TextClassifier(model, precision="fp32")
    words = ["film"] * 200
    words[100] = "superb"
    plain, hidden = (classifier.encode_windows([" ".join(w)])[0] for w in (["film"] * 200, words))
    assert all(len(row) == classifier.longest for row in hidden)
    difference = abs(classifier.score(hidden) - classifier.score(plain))
    assert difference.max() > 1e-3
    [short] = classifier.encode_windows(["a superb film"])
    assert [row.tolist() for row in short] == [
        row.tolist() for row in classifier.encode(["a superb film"])
    ]


def test_probabilities_are_calibrated(model):
    classifier = TextClassifier(model, precision="fp32")
    assert classifier.temperature == huggingface.read_temperature(model) != 1.0
    logits = classifier.logits(TEXTS)
    expected = softmax(logits / np.float32(classifier.temperature))
    np.testing.assert_allclose(classifier.probabilities(TEXTS), expected, atol=1e-6)
    assert (classifier.probabilities(TEXTS).argmax(1) == logits.argmax(1)).all()


def test_probabilities_sum_to_one_and_name_the_right_label(model):
    classifier = TextClassifier(model)
    assert classifier.labels == ["neg", "pos"]
    shares = classifier.probabilities(["a superb moving film", "a dreadful clumsy film"])
    assert shares.sum(1) == pytest.approx([1, 1])
    assert shares.argmax(1).tolist() == [1, 0]


def test_html_breaks_are_spaces_as_in_training(model):
    classifier = TextClassifier(model, precision="fp32")
    np.testing.assert_allclose(
        classifier.logits(["superb<br /><BR>film"]), classifier.logits(["superb  film"]), atol=1e-6
    )


def test_what_is_past_the_length_keeps_head_and_tail(model):
    classifier = TextClassifier(model, precision="fp32")
    how = classifier.preprocessing
    words = ["film"] * 200
    middle = [*words[:100], "superb", *words[101:]]
    tail = [*words[:-1], "superb"]
    plain, hidden, seen = classifier.logits([" ".join(t) for t in (words, middle, tail)])
    assert how.seq_len == 32
    np.testing.assert_allclose(hidden, plain, atol=1e-6)
    assert abs(seen - plain).max() > 1e-3


def test_no_texts_give_no_scores(model):
    assert TextClassifier(model).logits([]).shape == (0, 2)
    assert list(predict_texts(model, [])) == []


def test_predictions_stream(model):
    """Answers come before the last text is read."""
    taken = []

    def texts():
        for index in range(1000):
            taken.append(index)
            yield "superb film"

    answers = predict_texts(model, numbered(texts()))
    first = next(answers)
    assert first["label"] == "pos"
    assert len(taken) < 1000
    answers.close()


def test_lines_leave_out_what_is_empty():
    found = list(lines(io.BytesIO(b"a\n  \n\n" + "ü\r\nlast".encode())))
    assert found == [[(0, "a"), (3, "ü")], [(4, "last")]]
    assert list(lines(io.BytesIO(b""))) == list(lines(io.BytesIO(b"\n\n"))) == []


def test_lines_of_any_length_come_whole_and_in_order():
    texts = [str(n) * (n % 700) for n in range(2000)] + ["x" * 300_000, "end"]
    found = list(lines(io.BytesIO("\n".join(texts).encode())))
    assert [item for batch in found for item in batch] == [
        (row, text) for row, text in enumerate(texts) if text
    ]


def test_a_line_is_answered_before_the_next_one_comes(model):
    reading, writing = os.pipe()
    with open(reading, "rb") as stream, open(writing, "wb", buffering=0) as sender:
        answers = predict_texts(model, lines(stream))
        for row, label in ((0, "pos"), (2, "neg")):
            sender.write(b"superb film\n" if label == "pos" else b"\nawful film\n")
            answer = next(answers)  # would wait for ever if more had to come first
            assert (answer["row"], answer["label"]) == (row, label)
        sender.close()
        assert list(answers) == []


def test_lines_before_a_bad_one_are_answered():
    found = lines(io.BytesIO(b"good\nb\xffd\n"))
    assert next(found) == [(0, "good")]
    with pytest.raises(DataError, match="line 2 is not UTF-8"):
        next(found)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(RaybertError):
        TextClassifier(Folder(tmp_path))


def test_it_is_warmed_up_with_a_full_batch(model, monkeypatch):
    """Compiled for a few tokens, loops would run on one core."""
    classifier, rows = TextClassifier(model, precision="fp32"), []
    monkeypatch.setattr(classifier, "score", rows.extend)
    classifier.warm()
    tokens = sum(map(len, rows))
    assert classifier.tokens_per_batch - classifier.longest < tokens <= classifier.tokens_per_batch
    assert len(set(map(len, rows))) == 2


def test_rows_have_few_lengths_none_much_longer_than_its_texts():
    lengths = np.array([round_up(tokens) for tokens in range(1, 2049)])
    tokens = np.arange(1, 2049)
    assert (lengths >= tokens).all() and (np.diff(lengths) >= 0).all()
    assert (lengths - tokens < np.maximum(16, tokens / 16)).all()
    assert len(set(lengths)) <= 64


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_what_fills_a_row_up_is_no_answer(model, monkeypatch, count):
    classifier = TextClassifier(model, precision="fp32")
    expected = classifier.logits(TEXTS)[:count]
    seen = []
    compute = classifier._engine

    def note(ids, mask, lengths):
        seen.append((ids.shape[1], lengths))
        return compute(ids, mask, lengths)

    monkeypatch.setattr(classifier, "_engine", note)
    monkeypatch.setattr(TextClassifier, "longest", 7)  # shorter than what is missing
    rows = classifier.encode(TEXTS[:count])
    np.testing.assert_allclose(classifier._forward(rows), expected, atol=1e-5)
    [(length, lengths)] = seen
    assert length == sum(lengths) == round_up(sum(map(len, rows)))
    assert lengths[:count] == [len(row) for row in rows] and max([0, *lengths[count:]]) <= 7
