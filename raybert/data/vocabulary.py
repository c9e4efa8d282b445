"""Train a tokenizer: a pure function of the texts, whatever their order and the threads.

Two things in `tokenizers`' WordPiece trainer depend on the order of a hash map with a random seed:
the ids of the continuing characters (`##a`), and through them how ties between merges fall. Both go
away when these characters get their ids beforehand, in code-point order.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from itertools import chain

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.trainers import WordPieceTrainer

from raybert.data.text import text_hash
from raybert.data.tokenizer import (
    SPECIAL_TOKENS,
    STRIP_PATTERN,
    Tokenizer,
    TokenizerConfig,
    load_file,
)
from raybert.errors import DataError

_PREFIX = "##"
_ALPHABET = 1000  # characters at most, the most frequent ones, as BERT's own vocabulary
_SAMPLE_KEY = 0x5A3D


def make(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Train the configured tokenizer on texts, or load it.

    Raises:
        DataError: there is no text, or too few different words for `vocab_size`'s smallest value.
    """
    if config.kind == "file":
        assert config.path is not None  # TokenizerConfig requires it
        return load_file(config.path)
    drawn = sample(texts, config.train_chars)
    if not drawn:
        raise DataError("no text to train a tokenizer on")
    return _wordpiece(config, drawn) if config.kind == "wordpiece" else _words(config, drawn)


def sample(texts: Iterable[str], chars: int | None) -> list[str]:
    """Draw documents whose characters sum to at most `chars`, in an order of their own.

    Those with the smallest hashes are taken until the next one would not fit, so the draw depends
    on the set of documents alone, and one pass in bounded memory finds it.
    """
    if chars is None:
        return sorted(texts)
    heap: list[tuple[int, str]] = []  # the largest hash first
    bound: tuple[int, str] | None = None  # the first that did not fit; none may come after it
    total = 0
    for text in texts:
        item = (-text_hash(text, _SAMPLE_KEY), text)
        if bound is not None and item <= bound:
            continue
        heapq.heappush(heap, item)
        total += len(text)
        while total > chars and len(heap) > 1:
            bound = heapq.heappop(heap)
            total -= len(bound[1])
    return [text for _, text in sorted(heap, reverse=True)]


def _wordpiece(config: TokenizerConfig, texts: list[str]) -> Tokenizer:
    bare = _bare_wordpiece(config, {"[UNK]": 0})
    alphabet = _alphabet(bare, texts)
    continuing = [_PREFIX + c for c in alphabet if _continues(bare, c)]
    fixed = [*SPECIAL_TOKENS, *continuing]
    if len(fixed) + len(alphabet) > config.vocab_size:
        raise DataError(
            f"corpus.tokenizer.vocab_size={config.vocab_size} is too small for the text's "
            f"{len(alphabet)} characters; use at least {len(fixed) + len(alphabet) + 1}"
        )
    trainer = WordPieceTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=fixed,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=_PREFIX,
        show_progress=False,
    )
    bare.train_from_iterator(texts, trainer, length=len(texts))
    vocab = bare.get_vocab(with_added_tokens=True)
    # Built afresh: the trainer has made special tokens of the continuing characters.
    trained = _bare_wordpiece(config, dict(sorted(vocab.items(), key=lambda item: item[1])))
    trained.decoder = decoders.WordPiece(prefix=_PREFIX)
    return _finish(trained)


def _bare_wordpiece(config: TokenizerConfig, vocab: dict[str, int]) -> HfTokenizer:
    model = models.WordPiece(
        vocab=vocab,
        unk_token="[UNK]",
        max_input_chars_per_word=100,
        continuing_subword_prefix=_PREFIX,
    )
    tokenizer = HfTokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=config.lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _alphabet(tokenizer: HfTokenizer, texts: list[str]) -> list[str]:
    """The most frequent characters after normalization, in code-point order."""
    counts = np.zeros(0x110000, np.int64)
    for begin in range(0, len(texts), 1024):
        points = np.frombuffer("".join(texts[begin : begin + 1024]).encode("utf-32-le"), np.uint32)
        counts += np.bincount(points, minlength=len(counts))
    normal: Counter[str] = Counter()
    for point in np.flatnonzero(counts).tolist():
        for character in tokenizer.normalizer.normalize_str(chr(point)):
            if not character.isspace():
                normal[character] += int(counts[point])
    ranked = sorted(normal, key=lambda character: (-normal[character], character))
    return sorted(ranked[:_ALPHABET])


def _continues(tokenizer: HfTokenizer, character: str) -> bool:
    """Whether a character can stand inside a word rather than being one (punctuation, Han)."""
    normal = tokenizer.normalizer.normalize_str(f"a{character}a")
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(normal)) == 1


def _words(config: TokenizerConfig, texts: list[str]) -> Tokenizer:
    tokenizer = HfTokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    strip = normalizers.Replace(Regex(STRIP_PATTERN), "")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), strip])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Neither looks across a space, so each distinct piece is normalized once (see wordcache).
    pieces = Counter(chain.from_iterable(text.split(" ") for text in texts))
    counts: Counter[str] = Counter()
    for piece, count in pieces.items():
        normal = tokenizer.normalizer.normalize_str(piece)
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal):
            counts[word] += count
    ranked = sorted(
        (word for word, count in counts.items() if count >= config.min_frequency),
        key=lambda word: (-counts[word], word),
    )
    words = [*SPECIAL_TOKENS, *ranked[: config.vocab_size - len(SPECIAL_TOKENS)]]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer.model = models.WordLevel(vocab, unk_token="[UNK]")
    return _finish(tokenizer)


def _finish(tokenizer: HfTokenizer) -> Tokenizer:
    """Add the special tokens and the template `[CLS] text [SEP]`."""
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")],
    )
    return Tokenizer(tokenizer.to_str())
