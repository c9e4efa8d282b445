"""Train a byte-level BPE tokenizer, which expresses every text: it falls back to bytes.

Words are divided as in GPT-2, but with combining marks, which Indic and South-East Asian scripts
spell vowels with, and each ideograph is a word, so that tags of words can mark any of them.
`BpeTrainer` numbers characters in code-point order and breaks ties between merges by these numbers,
so the result depends on the counts of the words alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.trainers import BpeTrainer

from raybert.data.keyed import text_hash
from raybert.data.scripts import IDEOGRAPHIC

BYTES = 256
_MAX_PIECE_BYTES = 6_000_000  # of different words: training takes 300 times that in memory
_SAMPLE_KEY = 0x5A3E
_WORD = (
    rf" ?[{IDEOGRAPHIC}]| ?[[\p{{L}}\p{{M}}]&&[^{IDEOGRAPHIC}]]+| ?\p{{N}}+"
    r"| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
)


def _bounded(texts: list[str]) -> Iterator[str]:
    """Yield texts in the order of their hashes, until their words are too many.

    Between spaces, a text without spaces has long words that hardly ever repeat.
    """
    seen: set[str] = set()
    size = 0
    for text in sorted(texts, key=lambda text: text_hash(text, _SAMPLE_KEY)):
        new = set(text.split()) - seen
        size += sum(len(piece.encode()) for piece in new)
        if size > _MAX_PIECE_BYTES and seen:
            return
        seen |= new
        yield text


def train_byte_level(
    texts: list[str],
    *,
    vocab_size: int,
    min_frequency: int,
    lowercase: bool,
    special_tokens: list[AddedToken],
) -> HfTokenizer:
    """Train on texts; the template is left to the caller, after the post-processor."""
    tokenizer = HfTokenizer(models.BPE())
    parts = [normalizers.NFKC(), *([normalizers.Lowercase()] if lowercase else [])]
    tokenizer.normalizer = normalizers.Sequence(parts)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_bounded(texts), trainer)
    return tokenizer
