import pytest

from raybert.model.cost import flops_per_token, num_parameters
from raybert.model.encoder import Encoder
from raybert.model.settings import ModelConfig


def test_both_layouts_have_equally_many_parameters():
    modern, classic = (
        num_parameters(Encoder(ModelConfig(layout=layout, hidden_size=384, num_heads=6), 10).layers)
        for layout in ("modern", "classic")
    )
    assert modern == pytest.approx(classic, rel=0.01)


def test_the_keras_example_has_the_expected_parameters():
    config = ModelConfig(
        layout="classic",
        hidden_size=128,
        num_layers=1,
        num_heads=8,
        intermediate_size=128,
        max_seq_len=256,
    )
    layer = 4 * (128 * 128 + 128) + 2 * (128 * 128 + 128) + 2 * 2 * 128
    embeddings = (30_000 + 256 + 1) * 128 + 2 * 128
    assert num_parameters(Encoder(config, 30_000)) == embeddings + layer


def test_flops_are_six_per_weight_and_token_plus_attention():
    config = ModelConfig(layout="classic", hidden_size=64, num_layers=2, num_heads=2)
    weights = 2 * (4 * 64 * 64 + 2 * 64 * 256)
    assert flops_per_token(config, 128) == 6 * weights + 2 * 12 * 128 * 64
    head = 0.15 * 6 * (64 * 64 + 64 * 1000)
    assert flops_per_token(config, 128, 1000, 0.15) == pytest.approx(
        flops_per_token(config, 128) + head
    )


def test_a_local_layer_attends_to_its_window_only():
    values = {"hidden_size": 64, "num_layers": 4, "num_heads": 2, "max_seq_len": 512}
    every = ModelConfig(**values)
    some = ModelConfig(**values, global_attention_every=2, local_attention=128)
    difference = flops_per_token(every, 512) - flops_per_token(some, 512)
    assert difference == 6 * 2 * 64 * 2 * (512 - 129)  # two of the layers are local
    assert flops_per_token(every, 100) == flops_per_token(some, 100)
