import pytest
import torch
import torch.nn.functional as F

from raybert.data.masking import IGNORE_INDEX
from raybert.model.cost import num_parameters
from raybert.model.encoder import Encoder
from raybert.model.heads import Classifier, MaskedLM, pool
from raybert.model.huggingface import unsupported_by_transformers
from raybert.model.settings import HeadConfig, ModelConfig

LAYOUTS = ["modern", "classic"]


def encoder_of(layout, **changes):
    values = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "max_seq_len": 24}
    torch.manual_seed(0)
    return Encoder(ModelConfig(layout=layout, **(values | changes)), 50)


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (4, 20), generator=generator)
    masked = torch.rand(4, 20, generator=generator) < 0.3
    return ids, ids.masked_fill(~masked, IGNORE_INDEX)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_is_the_sum_over_predicted_tokens(layout):
    model = MaskedLM(encoder_of(layout))
    ids, labels = batch()
    total, count = model(ids, labels)
    predicted = labels != IGNORE_INDEX
    logits = model.logits(ids, None, predicted)
    assert count == predicted.sum()
    assert logits.shape == (count, 50)
    expected = F.cross_entropy(logits, labels[predicted], reduction="sum")
    torch.testing.assert_close(total, expected)
    flat = predicted.flatten().nonzero().squeeze(1)
    assert torch.equal(model.logits(ids, None, flat), logits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_output_matrix_is_tied_to_the_embedding(layout):
    model = MaskedLM(encoder_of(layout))
    weights = model.encoder.embeddings.tokens.weight
    assert sum(p.shape == weights.shape for p in model.parameters()) == 1
    ids, labels = batch()
    unseen = 49  # neither an input nor a target: its vector gets its gradient from the softmax
    total, _ = model(ids.clamp(max=48), labels.clamp(max=48))
    total.backward()
    assert weights.grad[unseen].abs().sum() > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_weight_has_a_gradient_even_without_a_predicted_token(layout):
    model = MaskedLM(encoder_of(layout))
    ids, labels = batch()
    for labels_now, learns in ((labels, True), (torch.full_like(labels, IGNORE_INDEX), False)):
        model.zero_grad()
        total, count = model(ids, labels_now)
        total.backward()
        assert (count > 0) == learns
        # DDP waits for the gradient of every parameter.
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert (parameter.grad.abs().sum() > 0) == learns, name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_batch_overfits(layout, precision):
    model = MaskedLM(encoder_of(layout))
    ids, labels = batch()
    ids = ids.masked_fill(labels != IGNORE_INDEX, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            total, count = model(ids, labels)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    assert total.item() / count < 0.1


@pytest.mark.parametrize(
    "head", [HeadConfig(), HeadConfig(kind="keras"), HeadConfig(pooling="mean")], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_classifier_overfits_and_ignores_padding(layout, head):
    model = Classifier(encoder_of(layout), 3, head)
    ids, _ = batch()
    mask = torch.arange(20) < torch.tensor([[20], [13], [4], [1]])
    targets = torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        loss = F.cross_entropy(model(ids, mask), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        logits = model(ids, mask)
        assert logits.shape == (4, 3)
        assert torch.equal(logits.argmax(dim=1), targets)
        assert torch.equal(model(ids.masked_fill(~mask, 7), mask), logits)
        torch.testing.assert_close(model(ids[1:2, :13]), logits[1:2])


def test_each_pooling_reduces_the_tokens_of_the_mask():
    x = torch.tensor([[[1.0, -5.0], [3.0, -1.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, False]])
    assert pool(x, mask, "cls").tolist() == [[1, -5]]
    assert pool(x, mask, "mean").tolist() == [[2, -3]]
    assert pool(x, mask, "max").tolist() == [[3, -1]]
    assert pool(x, None, "max").tolist() == [[9, 9]]


def test_the_default_pooling_depends_on_layout_and_head():
    modern, classic = encoder_of("modern"), encoder_of("classic")
    assert Classifier(modern, 2).pooling == "mean"
    assert Classifier(classic, 2).pooling == "cls"
    keras = Classifier(classic, 2, HeadConfig(kind="keras"))
    assert keras.pooling == "max"
    assert num_parameters(keras) - num_parameters(classic) == 64 * 64 + 64 + 2 * 64 + 2
    assert unsupported_by_transformers(HeadConfig(), modern.config) is None
    assert unsupported_by_transformers(HeadConfig(), classic.config) is None


@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_concatenated_texts_are_pooled_separately(layout, pooling):
    torch.manual_seed(0)
    model = Classifier(encoder_of(layout), 3, HeadConfig(pooling=pooling)).eval()
    lengths = [5, 5, 1, 24, 13]
    row = torch.randint(1, 50, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        together = model(row, None, lengths)
        alone = torch.cat([model(text) for text in row.split(lengths, dim=1)])
    assert together.shape == (5, 3)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
