import pytest
import torch

from raybert.config import build
from raybert.errors import ConfigError
from raybert.model.encoder import Encoder
from raybert.model.settings import ModelConfig

LAYOUTS = {
    "modern": {"layout": "modern"},
    "modern, local": {"layout": "modern", "global_attention_every": 2, "local_attention": 6},
    "classic": {"layout": "classic"},
}


def encoder_of(name, **changes):
    values = {"hidden_size": 64, "num_layers": 3, "num_heads": 2, "max_seq_len": 24}
    torch.manual_seed(0)
    return Encoder(ModelConfig(**(values | LAYOUTS[name] | changes)), 50)


def ids_of(*shape):
    return torch.randint(1, 50, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hidden_states_have_a_vector_for_each_token(layout):
    assert encoder_of(layout)(ids_of(3, 17)).shape == (3, 17, 64)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_does_not_change_hidden_states(layout, precision):
    encoder = encoder_of(layout)  # with gradients: bf16 training has its own kernel
    ids = ids_of(2, 20)
    mask = torch.arange(20) < torch.tensor([[20], [13]])
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        padded = encoder(ids.masked_fill(~mask, 0), mask)
        other = encoder(ids, mask)
        alone = encoder(ids[1:, :13])
    tolerance = 1e-5 if precision == torch.float32 else 5e-2
    torch.testing.assert_close(padded[1:, :13], alone, rtol=0, atol=tolerance)
    assert torch.equal(padded[1, :13], other[1, :13])


@pytest.mark.parametrize("lengths", [[20], [1, 1, 5, 5, 5, 20, 24], [24, 3, 3, 24, 1]])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_concatenated_texts_equal_separate_ones(layout, precision, lengths):
    encoder = encoder_of(layout).eval()
    row = ids_of(1, sum(lengths))
    texts = row.split(lengths, dim=1)
    with (
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16),
    ):
        together = encoder(row, lengths=lengths)
        alone = torch.cat([encoder(text) for text in texts], dim=1)
    assert together.shape == (1, sum(lengths), 64)
    tolerance = 1e-5 if precision == torch.float32 else 5e-2
    torch.testing.assert_close(together, alone, rtol=0, atol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_text_does_not_depend_on_its_neighbours_in_the_row(layout):
    encoder = encoder_of(layout).eval()
    row, lengths = ids_of(1, 30), [10, 12, 8]
    other = row.clone()
    other[:, :10], other[:, 22:] = row[:, 20:30], row[:, :8]
    with torch.inference_mode():
        one, two = (encoder(ids, lengths=lengths)[:, 10:22] for ids in (row, other))
    assert torch.equal(one, two)


def test_max_seq_len_limits_each_text_of_a_concatenated_row():
    encoder = encoder_of("modern")
    assert encoder(ids_of(1, 48), lengths=[24, 24]).shape == (1, 48, 64)
    with pytest.raises(ConfigError, match="a row of 25 tokens is longer than max_seq_len=24"):
        encoder(ids_of(1, 48), lengths=[23, 25])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_documents_equal_separate_rows(layout, precision):
    encoder = encoder_of(layout)
    ids = ids_of(2, 20)
    documents = torch.tensor([[0] * 8 + [1] * 12, [4] * 3 + [0] * 10 + [0] * 7])
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 13:] = False
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        packed = encoder(ids, mask, documents)
        apart = [encoder(ids[row : row + 1, a:b]) for row, a, b in PIECES]
    assert torch.isfinite(packed).all()
    tolerance = 1e-5 if precision == torch.float32 else 5e-2
    for (row, a, b), alone in zip(PIECES, apart, strict=True):
        torch.testing.assert_close(packed[row, a:b], alone[0], rtol=0, atol=tolerance)


PIECES = [(0, 0, 8), (0, 8, 20), (1, 0, 3), (1, 3, 13)]


@pytest.mark.parametrize("num_heads", [1, 2, 4])  # heads of 64, 32 and 16 dimensions
@pytest.mark.parametrize("layout", ["modern", "classic"])
def test_bf16_gradients_are_close_to_fp32(layout, num_heads):
    encoder = encoder_of(layout, num_heads=num_heads)
    ids = ids_of(4, 24)
    mask = torch.arange(24) < torch.tensor([[24], [20], [9], [1]])
    slope = torch.randn(4, 24, 64, generator=torch.Generator().manual_seed(2)) * mask[..., None]
    gradients = []
    for enabled in (False, True):
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            x = encoder(ids, mask).float()
        x.backward(slope)
        gradients.append(torch.cat([p.grad.flatten() for p in encoder.layers.parameters()]))
    exact, rough = gradients
    assert (rough - exact).norm() < 0.02 * exact.norm()


def test_dropout_draws_from_the_default_generator():
    encoder = encoder_of("modern", dropout=0.3).train()
    torch.manual_seed(5)
    first = encoder(ids_of(2, 8))
    second = encoder(ids_of(2, 8))
    torch.manual_seed(5)
    assert torch.equal(first, encoder(ids_of(2, 8)))
    assert not torch.equal(first, second)


def test_modern_is_initialised_as_in_the_paper():
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=256, num_layers=8, num_heads=4)
    encoder = Encoder(config, 5000)
    layer = encoder.layers[3]
    std = 0.8796 * 0.02  # truncation at two deviations leaves 0.8796 of the deviation
    for weight, expected in (
        (encoder.embeddings.tokens.weight, std),
        (layer.attention.qkv.weight, std),
        (layer.attention.out.weight, std / 4),  # 2 x 8 layers write to the residual stream
        (layer.feed_forward.up.weight, std),
        (layer.feed_forward.down.weight, std / 4),
    ):
        assert weight.std().item() == pytest.approx(expected, rel=0.02)
    assert encoder.embeddings.tokens.weight.abs().max() <= 0.04
    assert not encoder.embeddings.tokens.weight[0].any()  # padding


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"hidden_size": 100, "num_heads": 8},
            "hidden_size=100 is not a multiple of num_heads=8; use hidden_size=96 or 104",
        ),
        (
            {"hidden_size": 5, "num_heads": 8},
            "hidden_size=5 is not a multiple of num_heads=8; use hidden_size=8$",
        ),
        (
            {"hidden_size": 12, "num_heads": 4},
            "heads of 3 dimensions, and rotary .* use hidden_size=16 or layout=classic",
        ),
        (
            {"layout": "classic", "global_attention_every": 3},
            "global_attention_every=3 needs layout=modern; use 1",
        ),
        ({"dropout": 1.0}, "dropout=1.0: input should be less than 1"),
        ({"hiden_size": 100}, "unknown key hiden_size; did you mean hidden_size"),
    ],
)
def test_invalid_architectures_are_rejected(values, message):
    with pytest.raises(ConfigError, match=message):
        build(ModelConfig, values, "run.yaml")


def test_a_row_longer_than_max_seq_len_is_rejected():
    with pytest.raises(ConfigError, match="a row of 25 tokens is longer than max_seq_len=24; "):
        encoder_of("modern")(ids_of(1, 25))


def test_a_pad_id_outside_the_vocabulary_is_rejected():
    with pytest.raises(ConfigError, match="pad_id=50 is outside the vocabulary of 50 tokens"):
        Encoder(ModelConfig(), 50, pad_id=50)
