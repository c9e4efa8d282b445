"""Models that tests of serving share: tiny, and trained in a blink."""

import pytest
import torch
from making import finetune_job, make_corpus, pretrain_job, reviews

from raybert.storage import Folder
from raybert.train.run import execute_bare


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A classifier that tells good reviews from bad ones; its longest text has 32 tokens."""
    torch.set_num_threads(1)
    folder = Folder(tmp_path_factory.mktemp("classifier"))
    job = finetune_job(folder, rows=reviews(200), steps=None, epochs=5, lr=1e-2)
    execute_bare(job, folder / "run", on_progress=lambda record: None)
    return folder / "run" / "model"


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """A model that fills masks, badly."""
    torch.set_num_threads(1)
    folder = Folder(tmp_path_factory.mktemp("pretrained"))
    make_corpus(folder / "corpus")
    job = pretrain_job(folder / "corpus", steps=2)
    result = execute_bare(job, folder / "run", on_progress=lambda record: None)
    return Folder(result["model"])
