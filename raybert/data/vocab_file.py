"""BERT's first tokenizers: a `vocab.txt`, a token a line, with switches in a JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.models import WordPiece

VOCAB_FILE = "vocab.txt"


def wordpiece_of(text: str, config: Mapping[str, Any], special: Mapping[str, str]) -> str:
    """The content of a `tokenizer.json` with the ids of `transformers.BertTokenizer`.

    Args:
        text: the content of `vocab.txt`.
        config: of `tokenizer_config.json`; defaults are those of `BertTokenizer`.
        special: the tokens of the roles cls_token, sep_token, unk_token and others.

    Raises:
        ValueError: the vocabulary lacks one of those three.
    """
    vocab = {token: index for index, token in enumerate(text.removesuffix("\n").split("\n"))}
    roles = {role: special[role] for role in ("unk_token", "cls_token", "sep_token")}
    for role, token in roles.items():
        if token not in vocab:
            raise ValueError(f"it lacks the {role} {token!r}")
    tokenizer = HfTokenizer(WordPiece(vocab, unk_token=roles["unk_token"]))
    lowercase, strip = config.get("do_lower_case", True), config.get("strip_accents")
    tokenizer.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=config.get("tokenize_chinese_chars", True) is True,
        strip_accents=strip if isinstance(strip, bool) else None,
        lowercase=lowercase is True,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    cls, sep = ((roles[role], vocab[roles[role]]) for role in ("cls_token", "sep_token"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls[0]}:0 $A:0 {sep[0]}:0",
        pair=f"{cls[0]}:0 $A:0 {sep[0]}:0 $B:1 {sep[0]}:1",
        special_tokens=[cls, sep],
    )
    tokenizer.decoder = decoders.WordPiece()
    known = [token for token in special.values() if token in vocab]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in known])
    return str(tokenizer.to_str())
