"""New words for a tokenizer: those that a text often has, and that the tokenizer splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from raybert.data.tokenizer import Tokenizer
from raybert.errors import ConfigError


def with_new_words(
    tokenizer: Tokenizer, texts: Sequence[str], count: int, min_frequency: int
) -> Tokenizer:
    """Add the `count` most frequent words of texts that are not one token yet.

    Raises:
        ConfigError: the tokenizer is no WordPiece, whose words are entries of its vocabulary.
    """
    model = tokenizer.spec["model"]
    if model.get("type") != "WordPiece":
        raise ConfigError(
            f"corpus.tokenizer.new_words={count} extends WordPiece, and {tokenizer.name} is "
            f"{model.get('type')}; leave it out"
        )
    normalizer, splitter = tokenizer.hf.normalizer, tokenizer.hf.pre_tokenizer
    counts: Counter[str] = Counter()
    for text in texts:
        normal = text if normalizer is None else normalizer.normalize_str(text)
        words = [(normal, None)] if splitter is None else splitter.pre_tokenize_str(normal)
        counts.update(word for word, _ in words)
    longest = int(model.get("max_input_chars_per_word", 100))
    found = [
        word
        for word, times in counts.items()
        if times >= min_frequency and word not in model["vocab"] and len(word) <= longest
    ]
    ranked = sorted(found, key=lambda word: (-counts[word], word))
    return tokenizer.with_words(ranked[:count])
