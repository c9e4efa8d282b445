"""Scores of slices of the evaluated texts."""

import numpy as np

from raybert.inference.slices import slice_scores
from raybert.tasks.comparison import Predictions
from raybert.tasks.single_label import SingleLabel


def test_slices_have_their_own_scores():
    texts = ["word " * (1 + i % 40) for i in range(200)]
    labels = np.arange(200) % 2
    outputs = np.eye(2, dtype=np.float32)[labels] * 5
    outputs[np.arange(200) % 40 >= 30] = outputs[np.arange(200) % 40 >= 30][:, ::-1]  # long: wrong
    channels = ["mail" if i < 150 else "phone" if i < 195 else "fax" for i in range(200)]
    found = slice_scores(
        Predictions(SingleLabel(["a", "b"]), outputs, labels), texts, {"channel": channels}
    )
    lengths = [s for s in found if s["by"] == "words"]
    assert [s["value"] for s in lengths] == ["1 to 10", "11 to 20", "21 to 30", "31 to 40"]
    assert [s["score"] for s in lengths] == [1.0, 1.0, 1.0, 0.0]
    assert [(s["value"], s["texts"]) for s in found[4:]] == [("mail", 150), ("phone", 45)]
    assert sum(s["texts"] for s in lengths) == 200
