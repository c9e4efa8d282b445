"""Tiny model directories of every task, not trained."""

import numpy as np
import torch
from making import reviews, tokenizer_of

from raybert.model.encoder import Encoder
from raybert.model.heads import Classifier, MaskedLM
from raybert.model.huggingface import save_classifier, save_masked_lm
from raybert.model.settings import HeadConfig, ModelConfig
from raybert.tasks.linear.fitting import Weights
from raybert.tasks.linear.mixture import NgramPart
from raybert.tasks.linear.model import NgramModel
from raybert.tasks.linear.ngrams import Ngrams
from raybert.tasks.linear.store import save_part
from raybert.tasks.registry import TASKS as KNOWN

#: By name: the task, its labels, what was fitted, and its columns.
TASKS = {
    "single_label": (["neg", "pos"], {"temperature": 1.5}, {}),
    "multi_label": (["a", "b", "c"], {"thresholds": {"a": 0.5, "b": 0.1, "c": 0.9}}, {}),
    "regression": (["stars"], {"mean": [3.0], "std": [2.0], "intervals": [0.5]}, {}),
    "token_classification": (["O", "B-PER", "I-PER"], {}, {"label_column": "tags"}),
    "ngrams": (["neg", "pos"], {}, {}),  # beside the encoder
    "pairs": (["other", "same"], {"temperature": 0.5}, {"pair_column": "second"}),
}


def make_directory(folder, name, layout=None):
    """Write a tiny model of a task, or a masked language model, and return its files."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of([text for text, _ in reviews(40)])
    tokenizer.save(folder / "tokenizer")
    layout = layout or ("classic" if name in ("multi_label", "pairs") else "modern")
    shape = ModelConfig(layout=layout, hidden_size=16, num_layers=3, num_heads=2, max_seq_len=32)
    encoder = Encoder(shape, tokenizer.vocab_size, tokenizer.pad_id)
    how = {"seq_len": 32, "head_tokens": 8, "html_breaks": "space"}
    target = folder / "model"
    if name == "masked":
        save_masked_lm(MaskedLM(encoder), folder / "tokenizer", target, "card", how)
    else:
        labels, fitted, columns = TASKS[name]
        task = KNOWN["single_label" if name in ("pairs", "ngrams") else name]
        model = Classifier(encoder, len(labels), HeadConfig(), per_token=task.is_per_token)
        save_classifier(
            model,
            labels,
            folder / "tokenizer",
            target,
            "card",
            how,
            task.architecture,
            task.problem_type,
            {"name": task.name, "fitted": fitted, "columns": columns},
        )
    if name == "ngrams":
        words = {word: i for i, word in enumerate(["film", "superb", "a superb", "文"])}
        weights = Weights(*(np.full(shape, 0.5, np.float32) for shape in ((4, 2), (2,))))
        model = NgramModel(("tf-idf",), Ngrams(words), np.ones(4, np.float32), weights)
        fitted = task(labels, {"temperature": 2.0})
        save_part(NgramPart(model, 0.5, 1.5, fitted), target)
    return {file: target.read_bytes(file) for file in target.names()}
