"""Evaluation, prediction and serving read the whole of a text; what is cut is counted."""

import json

import numpy as np
import pyarrow as pa
import pytest
from making import reviews, tokenizer_of, write_csv

from raybert.config import build
from raybert.inference.bulk import _Scorer
from raybert.inference.classifier import TextClassifier
from raybert.pipeline.predict_stage import number_texts, predict_texts
from raybert.storage.folder import Folder
from raybert.tasks.prepared_texts import prepare_texts
from raybert.tasks.protocol import ALL_SCORES
from raybert.tasks.settings import FinetuneConfig

LONG = " ".join(["film"] * 60 + ["superb"] * 20 + ["film"] * 60)  # in no head and no tail
PLAIN = " ".join(["film"] * 140)


def test_evaluation_and_prediction_answer_alike_by_all_of_a_long_text(model):
    classifier = TextClassifier(model, precision="fp32")
    assert classifier.longest < 100
    texts = [LONG, PLAIN, "a superb film"]
    table = pa.table({"text": texts, "label": ["pos", "neg", "pos"]})
    scored = _Scorer(model.uri, 1, "fp32", True, ALL_SCORES)(table)
    outputs = np.stack([row.values.to_numpy() for row in scored["outputs"]])
    assert outputs[0, 1] > outputs[1, 1] + 0.01  # a middle that is left out would make them equal
    assert scored["is_long"].to_pylist() == [True, True, False]

    shares = classifier.task.scores(outputs)
    predicted = list(predict_texts(model, number_texts(texts), "fp32"))
    from_file = _Scorer(model.uri, 1, "fp32", False, ALL_SCORES)(table)["answer"].to_pylist()
    for share, one, other in zip(shares, predicted, map(json.loads, from_file), strict=True):
        assert one["scores"]["pos"] == pytest.approx(float(share[1]), abs=1e-5)
        assert other["scores"]["pos"] == pytest.approx(float(share[1]), abs=1e-5)


@pytest.mark.parametrize("seq_len", [12, 18, 64])
def test_what_training_cuts_is_counted(tmp_path, seq_len):
    folder, rows = Folder(tmp_path), reviews(80)
    tokenizer = tokenizer_of([text for text, _ in rows])
    path = write_csv(folder, "texts.csv", rows)
    config = build(FinetuneConfig, {"source": {"path": path}}, "test")
    prepared = prepare_texts(config, tokenizer, seq_len, 0, folder / "data")
    lengths = [len(ids) for ids in tokenizer.encode([text for text, _ in rows]).split()]
    assert prepared.cut == sum(length > seq_len for length in lengths)
