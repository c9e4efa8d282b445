"""Tiny encoders of architectures that `transformers` computes, not trained."""

import json

import torch
from making import reviews, tokenizer_of
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from raybert.storage.folder import Folder

TEXTS = [text for text, _ in reviews(160)]
KINDS = ["roberta", "distilbert", "electra", "deberta", "deberta-v2", "albert", "mpnet"]


def change_tensor(path, name, change):
    """Change a tensor of a model directory, or take it out."""
    tensors = load_file(path / "model.safetensors")
    assert name in tensors
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor).contiguous()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def make_other(path, kind):
    """A directory as transformers writes it: the masked language model of a kind, a tokenizer."""
    import transformers

    vocab_size = _save_tokenizer(path, kind)
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 50 if kind in ("roberta", "mpnet") else 48,
        "pad_token_id": 1 if kind in ("roberta", "mpnet") else 0,
        "initializer_range": 0.1,  # small models learn from that within seconds
    }
    own = {
        "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
        "electra": {"embedding_size": 8},
        "albert": {"embedding_size": 8},
        "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    }.get(kind, {})
    config = transformers.AutoConfig.for_model(kind, **sizes, **own)
    torch.manual_seed(0)
    model = transformers.AutoModelForMaskedLM.from_config(config)
    model.save_pretrained(path)
    return path


def _save_tokenizer(path, kind):
    path.mkdir()
    if kind not in ("roberta", "mpnet"):
        tokenizer = tokenizer_of(TEXTS)
        tokenizer.save(Folder(path))
        return tokenizer.vocab_size
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[*special.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    made.save(str(path / "tokenizer.json"))
    roles = {f"{role}_token": token for role, token in special.items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return made.get_vocab_size()
