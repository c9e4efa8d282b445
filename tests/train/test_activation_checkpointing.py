"""Layers that are computed again in the backward pass: the same numbers, less memory."""

import pytest
import torch
from making import Attempt, finetune_job, make_corpus, pretrain_job, same_tensors

from raybert.model.encoder import Encoder
from raybert.model.settings import ModelConfig
from raybert.storage.folder import Folder


def trained(job, run):
    attempt = Attempt(job, run)
    attempt.run()
    return [r["loss"] for r in attempt.of_kind("train")], attempt.task.model.state_dict()


@pytest.mark.parametrize("layout", ["modern", "classic"])
def test_recomputed_layers_learn_the_same_bit_for_bit(tmp_path, layout):
    """With dropout, whose draws are made again; packed documents and accumulation, too."""
    corpus, model = Folder(tmp_path) / "corpus", {"layout": layout, "dropout": 0.2, "num_layers": 2}
    make_corpus(corpus, documents=51)
    found = [
        trained(
            pretrain_job(corpus, model, activation_checkpointing=on), Folder(tmp_path) / str(on)
        )
        for on in (False, True)
    ]
    assert found[0][0] == found[1][0]
    assert same_tensors(found[0][1], found[1][1])


def test_fine_tuning_with_its_regularisers_learns_the_same(tmp_path):
    """R-Drop and adversarial training run the model several times in a step."""
    found = []
    for on in (False, True):
        job = finetune_job(
            Folder(tmp_path), activation_checkpointing=on, r_drop=1.0, adversarial=1.0
        )
        found.append(trained(job, Folder(tmp_path) / str(on)))
    assert found[0][0] == found[1][0]
    assert same_tensors(found[0][1], found[1][1])


def test_a_layer_keeps_its_input_only():
    encoder = Encoder(ModelConfig(hidden_size=32, num_layers=6, num_heads=2), 50)
    ids = torch.randint(1, 50, (4, 32))
    kept = {}
    for recomputes in (False, True):
        for layer in encoder.layers:
            layer.recomputes = recomputes
        sizes = {}

        def note(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            encoder(ids).sum()
        own = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
        kept[recomputes] = sum(size for at, size in sizes.items() if at not in own)
    assert kept[True] < kept[False] / 4
