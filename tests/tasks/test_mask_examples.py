"""Examples of a pretraining: whole words of the user's own held-out text, and a warning."""

import re

import numpy as np
import pytest
import torch
from making import make_corpus, pretrain_job, reviews

from raybert.data.corpus.parts import PartReader
from raybert.data.tokenizer import Tokenizer
from raybert.data.tokenizer_training import TokenizerConfig, make_tokenizer
from raybert.pipeline.stages import warn_above_unigram
from raybert.storage.folder import Folder
from raybert.tasks.mask_examples import COUNT, _mask_a_word, heldout_examples
from raybert.tasks.settings import PretrainConfig
from raybert.terminal.display import Display
from raybert.train.distributed import Group
from raybert.train.task import LoaderConfig


def test_examples_are_words_of_the_held_out_text(tmp_path):
    folder = Folder(tmp_path)
    texts = [f"{text} number" for text, _ in reviews(120)]
    manifest = make_corpus(folder, texts=texts)
    tokenizer = Tokenizer.load(folder)
    found = heldout_examples(PartReader(folder, manifest, "heldout"), tokenizer)
    assert len(found) == COUNT
    heldout = " ".join(texts[:12])
    for text, expected in found:
        assert text.count("[MASK]") == 1
        assert text.replace("[MASK]", expected) in heldout
    assert heldout_examples(PartReader(folder, manifest, "heldout"), tokenizer) == found


def test_a_run_shows_them_unless_it_has_its_own(tmp_path):
    folder = Folder(tmp_path)
    make_corpus(folder)

    @torch.inference_mode()
    def fillings(examples):
        task = pretrain_job(folder, examples=examples).make_task(Group(), LoaderConfig())
        return task.evaluate()["fillings"]

    assert PretrainConfig().examples is None  # none about anything in particular
    own = fillings(None)
    assert len(own) == COUNT and all(each["expected"].isalpha() for each in own)
    [given] = fillings(["a [MASK]"])
    assert given["text"] == "a [MASK]" and "expected" not in given
    assert fillings([]) == []


@pytest.mark.parametrize("kind", ["wordpiece", "byte_bpe", "words"])
def test_a_whole_word_is_masked(kind):
    texts = ["a story of unbelievably long words and people in towns"] * 3
    tokenizer = make_tokenizer(TokenizerConfig(kind=kind, vocab_size=280), texts)
    ragged = tokenizer.encode(texts[:1])
    ids, starts = ragged.values[1:-1].astype(np.int64), ragged.word_starts[1:-1]
    text, word = _mask_a_word(ids, starts, tokenizer)
    assert word in texts[0].split()
    assert text == re.sub(rf"\b{word}\b", "[MASK]", texts[0], count=1)
    assert _mask_a_word(ids[:0], starts[:0], tokenizer) is None


@pytest.mark.parametrize(
    ("loss", "unigram", "words"),
    [
        (5.0, 6.0, ""),
        (6.5, 6.0, "warning   the held-out loss 6.500 is not below the unigram model's 6.000"),
        (6.0, 6.0, "train longer (pretrain.steps, pretrain.minutes), or lower pretrain.lr"),
        (5.0, None, ""),
        (None, 6.0, "warning   no held-out token was predicted"),
    ],
)
def test_a_model_above_the_unigram_loss_is_warned_of(capsys, loss, unigram, words):
    warn_above_unigram({"loss": loss, "unigram_loss": unigram}, Display())
    shown = capsys.readouterr().err
    assert words in shown and bool(shown) == bool(words)
