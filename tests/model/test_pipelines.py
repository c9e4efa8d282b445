"""The pipelines of transformers on our model directories, with texts longer than the model."""

import pytest
from model_directories import make_directory

from raybert.storage.folder import Folder

LONG = "a superb film " * 50


@pytest.mark.parametrize("layout", ["modern", "classic"])
def test_pipelines_cut_long_texts_and_pad_short_ones(layout, tmp_path):
    from transformers import pipeline

    for name in ("single_label", "pairs", "masked"):
        make_directory(Folder(tmp_path / name), name, layout)
    classify = pipeline("text-classification", model=str(tmp_path / "single_label/model"))
    short, long = classify(["a film", LONG], truncation=True, batch_size=2)
    assert short["score"] == pytest.approx(classify("a film")[0]["score"], abs=1e-5)
    assert long["score"] == pytest.approx(classify(LONG + LONG, truncation=True)[0]["score"])
    compare = pipeline("text-classification", model=str(tmp_path / "pairs/model"))
    pairs = [{"text": LONG, "text_pair": LONG}, {"text": "a film", "text_pair": "a story"}]
    assert len(compare(pairs, truncation=True, batch_size=2)) == 2
    fill = pipeline("fill-mask", model=str(tmp_path / "masked/model"))
    [best, *_] = fill(f"a [MASK] {LONG}", tokenizer_kwargs={"truncation": True})
    assert best["token_str"]
