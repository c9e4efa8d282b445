"""Train a tokenizer: a pure function of the set of texts, for any order and number of threads.

Two results of `tokenizers`' WordPiece trainer depend on the order of a hash map with a random seed:
the ids of the continuing characters (`##a`) and, through them, how ties between merges are broken.
Both are fixed by giving these characters their ids beforehand, in code-point order.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from typing import Literal

import numpy as np
from pydantic import Field, model_validator
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.trainers import WordPieceTrainer

from raybert.config import Settings
from raybert.data.encoding import STRIP_PATTERN
from raybert.data.keyed import text_hash
from raybert.data.tokenizer import SPECIAL_TOKENS, TOKENIZER_FILE, Tokenizer
from raybert.data.vocab_file import VOCAB_FILE
from raybert.errors import DataError
from raybert.storage.folder import Folder

_PREFIX = "##"
_MAX_ALPHABET = 1000  # the most frequent characters are kept, as in BERT's own vocabulary
_SAMPLE_KEY = 0x5A3D


class TokenizerConfig(Settings):
    """The tokenizer of a corpus."""

    kind: Literal["wordpiece", "words", "file"] = Field(
        "wordpiece",
        description="wordpiece: trained on the corpus; words: the most frequent words, lower-case "
        "and without punctuation, as Keras' TextVectorization; file: an existing tokenizer.json",
    )
    path: str | None = Field(
        None, description="for kind file: a tokenizer.json, or a folder that has one"
    )
    vocab_size: int = Field(8192, ge=16, description="tokens, including special tokens")
    lowercase: bool = Field(True, description="for kind wordpiece: also strips accents")
    min_frequency: int = Field(2, ge=1, description="least frequency of a merge or a word")
    train_chars: int | None = Field(
        20_000_000,
        ge=1,
        description="characters to train on, at most, of documents drawn by a hash of their text; "
        "null: all, in memory that grows with the text",
    )

    @model_validator(mode="after")
    def _consistent(self) -> TokenizerConfig:
        if self.kind == "file" and not self.path:
            raise ValueError("kind=file needs path: a tokenizer.json, or a folder that has one")
        if self.kind != "file" and self.path:
            raise ValueError(f"path={self.path} goes with kind=file, not with kind={self.kind}")
        if self.kind == "words" and not self.lowercase:
            raise ValueError("lowercase=false goes with kind=wordpiece; words are lower-case")
        return self


def make_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Train the configured tokenizer on texts (DataError if there are none), or load it."""
    if config.kind == "file":
        assert config.path is not None  # TokenizerConfig requires it
        return load_file(config.path)
    drawn = draw_texts(texts, config.train_chars)
    if not drawn:
        raise DataError("no text to train a tokenizer on")
    return _wordpiece(config, drawn) if config.kind == "wordpiece" else _words(config, drawn)


def draw_texts(texts: Iterable[str], chars: int | None) -> list[str]:
    """Draw texts with at most `chars` characters in all; None draws all of them.

    The texts with the smallest hashes, until the next one would not fit: so the draw and its order
    depend only on the set of texts, and one pass in bounded memory computes it.
    """
    if chars is None:
        return sorted(texts)
    heap: list[tuple[int, str]] = []  # of the negated hash: the largest hash first
    bound: tuple[int, str] | None = None  # the smallest hash that did not fit
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
    untrained = _untrained_wordpiece(config, {"[UNK]": 0})
    alphabet = _alphabet(untrained, texts)
    continuing = [_PREFIX + c for c in alphabet if _continues(untrained, c)]
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
    untrained.train_from_iterator(texts, trainer, length=len(texts))
    vocab = untrained.get_vocab(with_added_tokens=True)
    # Built anew, because the trainer made special tokens of the continuing characters.
    trained = _untrained_wordpiece(config, dict(sorted(vocab.items(), key=lambda item: item[1])))
    trained.decoder = decoders.WordPiece(prefix=_PREFIX)
    return _finish(trained)


def _untrained_wordpiece(config: TokenizerConfig, vocab: dict[str, int]) -> HfTokenizer:
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
    return sorted(ranked[:_MAX_ALPHABET])


def _continues(tokenizer: HfTokenizer, character: str) -> bool:
    """Whether a character can continue a word; punctuation and Han characters are words."""
    normal = tokenizer.normalizer.normalize_str(f"a{character}a")
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(normal)) == 1


def _words(config: TokenizerConfig, texts: list[str]) -> Tokenizer:
    tokenizer = HfTokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    strip = normalizers.Replace(Regex(STRIP_PATTERN), "")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), strip])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Neither depends on text across a space, so each distinct piece is normalized once.
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


def load_file(path: str) -> Tokenizer:
    """Load a tokenizer from a `tokenizer.json` or `vocab.txt`, or from a folder that has one."""
    folder = Folder(path)
    if folder.path.endswith(".json"):
        parent, name = Folder.of_file(folder.uri)
        if name == TOKENIZER_FILE:
            return Tokenizer.load(parent)
        try:
            return Tokenizer(parent.read_text(name), None, path)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file") from None
    if folder.path.endswith(f"/{VOCAB_FILE}"):
        folder, _ = Folder.of_file(folder.uri)
    if not Tokenizer.exists(folder):
        hub = " (names on a hub are not looked up: download it first)" if "/" in path else ""
        raise DataError(f"{folder / TOKENIZER_FILE}: no such file{hub}")
    return Tokenizer.load(folder)
