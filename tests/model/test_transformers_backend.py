"""Encoders of other architectures, which `transformers` computes."""

import shutil
import sys

import pytest
import safetensors.torch
import torch
from others import KINDS, make_other

from raybert.data.tokenizer import Tokenizer
from raybert.errors import ConfigError, DamagedError, UserError
from raybert.inference.classifier import TextClassifier
from raybert.inference.explanations import Explainer
from raybert.model import huggingface
from raybert.model.layers import layer_number
from raybert.model.lora import add_lora, merged
from raybert.model.settings import HeadConfig
from raybert.storage.folder import Folder
from raybert.tasks.categorical import kl_divergence
from raybert.tasks.regularization import RegularizedLoss, SupervisedLoss

LABELS = ["neg", "pos", "so-so"]
READS = {"seq_len": 48, "head_tokens": 12, "html_breaks": "space"}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The directory of a kind, made once."""
    root, made = tmp_path_factory.mktemp("published"), {}

    def get(kind):
        if kind not in made:
            made[kind] = Folder(make_other(root / kind, kind))
        return made[kind]

    return get


@pytest.fixture
def copied(published, tmp_path):
    """A copy of RoBERTa's directory, to be changed."""
    return Folder(shutil.copytree(published("roberta").uri, tmp_path / "copied"))


def classifier_on(folder, num_labels=3, head=None, **settings):
    torch.manual_seed(0)
    return huggingface.make_classifier_on(folder, num_labels, head or HeadConfig(), **settings)


def rows_of(folder):
    """The ids of two texts of different lengths."""
    encoded = Tokenizer.load(folder).encode(["the film was a superb film", "dull"]).split()
    return [torch.tensor(ids.astype("int64")) for ids in encoded]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_token", [False, True])
def test_transformers_computes_the_same_from_what_is_saved(kind, per_token, published, tmp_path):
    import transformers

    folder = published(kind)
    model = classifier_on(folder, per_token=per_token).eval()
    name = "TokenClassification" if per_token else "SequenceClassification"
    saved = Folder(tmp_path / "model")
    huggingface.save_classifier(
        model, LABELS, folder, saved, "card", READS, architecture=f"For{name}", temperature=2.0
    )
    theirs = getattr(transformers, f"AutoModelFor{name}").from_pretrained(saved.uri).eval()
    assert type(theirs) is type(model.model)
    assert [theirs.config.id2label[i] for i in range(3)] == LABELS
    first = rows_of(folder)[0][None]
    with torch.no_grad():
        expected = theirs(input_ids=first).logits
        torch.testing.assert_close(model(first) / 2, expected, rtol=0, atol=1e-5)

    loaded, labels = huggingface.load_classifier(saved)
    assert labels == LABELS
    rows = rows_of(folder)
    row, lengths = torch.cat(rows)[None], [len(each) for each in rows]
    with torch.no_grad():
        together = loaded.eval()(row, None, lengths)
        alone = [loaded(each[None])[0] for each in rows]
    joined = torch.cat(alone)[None] if per_token else torch.stack(alone)
    torch.testing.assert_close(together, joined, rtol=0, atol=1e-5)
    torch.testing.assert_close(alone[0], expected[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_comes_and_goes_bit_for_bit(kind, published, tmp_path):
    folder = published(kind)
    huggingface.save_classifier(
        classifier_on(folder), LABELS, folder, Folder(tmp_path / "model"), "card"
    )
    before, after = (
        safetensors.torch.load_file(f"{path}/model.safetensors")
        for path in (folder.uri, tmp_path / "model")
    )
    common = before.keys() & after.keys()
    assert len(common) >= 0.7 * len(before)
    assert all(torch.equal(before[name], after[name]) for name in common)
    new, old = ((Folder(tmp_path / "model"), folder)[i].read_json("config.json") for i in (0, 1))
    changed = {key for key in old if new.get(key) != old[key]}
    assert changed <= {"architectures", *(key for key in old if "dropout" in key)}


def test_the_longest_text_is_the_one_that_the_positions_allow(published):
    for kind, longest in (("roberta", 48), ("distilbert", 48), ("deberta", 48)):
        shape, _ = huggingface.read_model_config(published(kind))
        assert shape.max_seq_len == longest
        model = classifier_on(published(kind)).eval()
        with torch.no_grad():
            assert model(torch.full((1, longest), 7)).isfinite().all()


@pytest.fixture(scope="module")
def served(published, tmp_path_factory):
    folder, target = published("roberta"), Folder(tmp_path_factory.mktemp("served") / "model")
    task = {"name": "single_label", "fitted": {}, "columns": {}}
    huggingface.save_classifier(
        classifier_on(folder), LABELS, folder, target, "card", READS, task=task
    )
    return target


def test_it_classifies_as_transformers_pipeline(served):
    from transformers import pipeline

    texts = ["a superb film", "what a dull, dull film it was", ""]
    classifier = TextClassifier(served, precision="fp32")
    ours = classifier.probabilities(texts)
    theirs = pipeline("text-classification", served.uri, top_k=None)(texts)
    for row, found in zip(ours, theirs, strict=True):
        scores = {each["label"]: each["score"] for each in found}
        assert row.tolist() == pytest.approx([scores[name] for name in LABELS], abs=1e-5)
    rounded = TextClassifier(served, precision="bf16").probabilities(texts)
    assert abs(rounded - ours).max() < 0.02


def test_its_answers_are_explained(served):
    found = Explainer(TextClassifier(served, precision="fp32")).explain("a superb film")
    assert [word.text for word in found.words] == ["a", "superb", "film"]
    assert sum(word.weight for word in found.words) == pytest.approx(found.margin, abs=0.02)


def change_config(folder, **values):
    folder.write_json("config.json", {**folder.read_json("config.json"), **values})


def change_weights(folder, change):
    path = f"{folder.uri}/model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


QUERY = "roberta.encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda at: change_config(at, model_type="gpt2"), "model of type gpt2"),
        (lambda at: change_config(at, model_type="t5"), "model of type t5"),
        (
            lambda at: change_config(at, model_type="mine", auto_map={"AutoModel": "mine.Mine"}),
            r"type mine, whose code \(auto_map\) raybert does not run",
        ),
        (lambda at: change_config(at, num_hidden_layers="two"), "roberta"),
        (lambda at: change_config(at, hidden_act="mine"), "mine"),
        (lambda at: change_config(at, num_hidden_layers=10**8), "num_hidden_layers=100000000"),
        (lambda at: change_config(at, hidden_size=10**6, num_attention_heads=1), "do not fit"),
        (
            lambda at: change_config(at, intermediate_size=25),
            r"in place of \[25",
        ),
        (
            lambda at: change_weights(at, lambda tensors: tensors.pop(QUERY)),
            f"{QUERY} is missing",
        ),
        (
            lambda at: change_weights(at, lambda t: t.update({QUERY: torch.zeros(3, 5)})),
            rf"{QUERY} has shape \[3, 5\] in place of \[16, 16\]",
        ),
        (
            lambda at: change_weights(at, lambda t: t.update({QUERY: t[QUERY] / 0})),
            f"{QUERY} has values that are not finite",
        ),
    ],
)
def test_what_transformers_can_not_read_is_named(copied, damage, message):
    damage(copied)
    with pytest.raises((UserError, DamagedError), match=message) as caught:
        classifier_on(copied)
    assert "\n" not in str(caught.value)


def test_pickles_are_never_opened(copied):
    torch.save({}, f"{copied.uri}/pytorch_model.bin")
    copied.delete("model.safetensors")
    with pytest.raises(UserError, match="pytorch_model.bin, which raybert does not open"):
        classifier_on(copied)


def test_the_extra_is_named_where_transformers_is_missing(copied, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'raybert\[hf\]'"):
        huggingface.read_model_config(copied)


def test_it_is_not_pretrained_further(copied):
    with pytest.raises(UserError, match="of type roberta; of masked language models raybert reads"):
        huggingface.read_own_config(copied)


def test_a_model_without_a_head_is_no_classifier(copied):
    with pytest.raises(UserError, match="no classification head"):
        huggingface.load_classifier(copied)


@pytest.mark.parametrize(
    ("head", "compiles", "message"),
    [
        ({"kind": "keras"}, False, "finetune.head.kind=keras"),
        ({"pooling": "mean"}, False, "finetune.head.pooling=mean"),
        ({}, True, "finetune.compile=true"),
    ],
)
def test_settings_of_raybert_s_own_layers_are_refused(head, compiles, message, copied):
    with pytest.raises(ConfigError, match=message):
        huggingface.check_settings(copied, HeadConfig(**head), compiles=compiles)


def test_precisions_of_raybert_s_own_encoders_are_refused(served):
    with pytest.raises(UserError, match="serve.precision=int8 is for raybert's own"):
        TextClassifier(served, precision="int8")


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_and_regularizers_work_on_it(kind, published):
    model = classifier_on(published(kind))
    add_lora(model, 2, 4.0)
    ids = rows_of(published(kind))[0][None]
    supervised = SupervisedLoss(lambda logits, targets: logits.sum(), kl_divergence)
    loss = RegularizedLoss(supervised, kl_divergence, 1.0, 1.0, 0.1)
    loss(model, model, ids, None, torch.tensor([1])).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == learns
    adapters = [name for name in learns if name.endswith(".up")]
    assert adapters and all(layer_number(name) is not None for name in adapters)
    with torch.no_grad():
        for name in adapters:
            model.get_parameter(name).normal_()
        plain = merged(model.eval())
        assert plain.state_dict().keys() == classifier_on(published(kind)).state_dict().keys()
        torch.testing.assert_close(plain(ids), model(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "electra", "albert"])
def test_dropout_is_what_is_configured(kind, published):
    model = classifier_on(published(kind), head=HeadConfig(dropout=0.3), dropout=0.2)
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert {0.2, 0.3} <= rates
    assert all(module.training for module in model.modules())
