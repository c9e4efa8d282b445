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
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.trainers import WordPieceTrainer

from raybert.config import Settings
from raybert.data.byte_level import BYTES, train_byte_level
from raybert.data.encoding import STRIP_PATTERN
from raybert.data.keyed import text_hash
from raybert.data.new_words import with_new_words
from raybert.data.scripts import share_without_spaces
from raybert.data.tokenizer import SPECIAL_TOKENS, TOKENIZER_FILE, Tokenizer
from raybert.data.unknown import WARNED, count_unknown_of_sample
from raybert.data.vocab_file import VOCAB_FILE
from raybert.errors import DataError
from raybert.storage.folder import Folder

_PREFIX = "##"
_MIN_ALPHABET = 1000  # the most frequent characters are kept, as in BERT's own vocabulary
_COVERAGE = 0.9995  # of the text, by so many more of them, as by default in SentencePiece
_MIN_COVERAGE = 0.8
_WITHOUT_SPACES = 0.1  # share of the letters from which words are not to be looked for by spaces
_SAMPLE_KEY = 0x5A3D
_BYTE_LEVEL_SIZE = BYTES + len(SPECIAL_TOKENS)


class TokenizerConfig(Settings):
    """The tokenizer of a corpus."""

    kind: Literal["auto", "wordpiece", "byte_bpe", "words", "file"] = Field(
        "auto",
        description="wordpiece: trained on the corpus; byte_bpe: byte-level BPE, trained on the "
        "corpus, for any script; auto: byte_bpe for scripts without spaces and where wordpiece "
        "leaves more than 1% unknown, wordpiece otherwise; words: the most frequent words, "
        "lower-case and without punctuation, as Keras' TextVectorization; file: an existing "
        "tokenizer.json",
    )
    path: str | None = Field(
        None, description="for kind file: a tokenizer.json, or a folder that has one"
    )
    vocab_size: int = Field(8192, ge=16, description="tokens, including special tokens")
    lowercase: bool = Field(True, description="read text in lower case; wordpiece strips accents")
    min_frequency: int = Field(2, ge=1, description="least frequency of a merge or a word")
    train_chars: int | None = Field(
        20_000_000,
        ge=1,
        description="characters to train on, at most, of documents drawn by a hash of their text; "
        "null: all, in memory that grows with the text",
    )
    new_words: int = Field(
        0,
        ge=0,
        description="for kind file and WordPiece: so many of the text's most frequent words that "
        "the tokenizer splits become tokens; pretraining from the model beside it begins with the "
        "mean of their pieces' embeddings",
    )
    special_tokens_in_text: bool = Field(
        False,
        description="whether the spelling of a special token in a text, such as [SEP], is that "
        "token; by default it is text",
    )

    @model_validator(mode="after")
    def _consistent(self) -> TokenizerConfig:
        if self.kind == "file" and not self.path:
            raise ValueError("kind=file needs path: a tokenizer.json, or a folder that has one")
        if self.kind != "file" and self.path:
            raise ValueError(f"path={self.path} goes with kind=file, not with kind={self.kind}")
        if self.kind != "file" and self.new_words:
            raise ValueError(f"new_words={self.new_words} goes with kind=file, not {self.kind}")
        if self.kind == "words" and not self.lowercase:
            raise ValueError("lowercase=false goes with kind=wordpiece; words are lower-case")
        if self.kind == "byte_bpe" and self.vocab_size < _BYTE_LEVEL_SIZE:
            raise ValueError(
                f"vocab_size={self.vocab_size} is too small for kind=byte_bpe, which has "
                f"{BYTES} bytes and {len(SPECIAL_TOKENS)} special tokens; use at least "
                f"{_BYTE_LEVEL_SIZE}"
            )
        return self


class TrainedTokenizer(NamedTuple):
    """A tokenizer, what kind it is, and what share of the texts it can't express."""

    tokenizer: Tokenizer
    kind: str
    unknown: float | None = None  # None where it was not measured, or there is no token


def make_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """As `train_tokenizer`; only the tokenizer."""
    return train_tokenizer(config, texts).tokenizer


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> TrainedTokenizer:
    """Train the configured tokenizer on texts (DataError if there are none), or load it."""
    found = _load_or_train(config, texts)
    if not config.special_tokens_in_text:
        return found
    return found._replace(tokenizer=found.tokenizer.with_special_tokens_in_text())


def _load_or_train(config: TokenizerConfig, texts: Iterable[str]) -> TrainedTokenizer:
    if config.kind == "file":
        assert config.path is not None  # TokenizerConfig requires it
        loaded = load_file(config.path)
        if config.new_words:
            drawn = draw_texts(texts, config.train_chars)
            loaded = with_new_words(loaded, drawn, config.new_words, config.min_frequency)
        return TrainedTokenizer(loaded, config.kind)
    drawn = draw_texts(texts, config.train_chars)
    if not drawn:
        raise DataError("no text to train a tokenizer on")
    if config.kind != "auto":
        return _measured(_TRAINERS[config.kind](config, drawn), config.kind, drawn)
    has_room = config.vocab_size >= _BYTE_LEVEL_SIZE
    if not (has_room and share_without_spaces(count_characters(drawn)) >= _WITHOUT_SPACES):
        found = _measured(_wordpiece(config, drawn), "wordpiece", drawn)
        if not has_room or found.unknown is None or found.unknown < WARNED:
            return found
    return _measured(_byte_level(config, drawn), "byte_bpe", drawn)


def _measured(tokenizer: Tokenizer, kind: str, texts: list[str]) -> TrainedTokenizer:
    return TrainedTokenizer(tokenizer, kind, count_unknown_of_sample(texts, tokenizer).share)


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
    alphabet = _alphabet(untrained, texts, config.vocab_size)
    continuing = [_PREFIX + c for c in alphabet if _continues(untrained, c)]
    fixed = [*SPECIAL_TOKENS, *continuing]
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


def count_characters(texts: list[str]) -> dict[str, int]:
    """How often each character occurs, in code-point order."""
    counts = np.zeros(0x110000, np.int64)
    for begin in range(0, len(texts), 1024):
        points = np.frombuffer("".join(texts[begin : begin + 1024]).encode("utf-32-le"), np.uint32)
        counts += np.bincount(points, minlength=len(counts))
    return {chr(point): int(counts[point]) for point in np.flatnonzero(counts).tolist()}


def _alphabet(tokenizer: HfTokenizer, texts: list[str], vocab_size: int) -> list[str]:
    """The most frequent characters after normalization that fit, in code-point order."""
    normal: Counter[str] = Counter()
    for raw, count in count_characters(texts).items():
        for character in tokenizer.normalizer.normalize_str(raw):
            if not character.isspace():
                normal[character] += count
    ranked = sorted(normal, key=lambda character: (-normal[character], character))
    total, covered, kept, room = normal.total(), 0, list[str](), vocab_size - len(SPECIAL_TOKENS)
    for character in ranked:
        entries = 1 + _continues(tokenizer, character)
        is_covered = len(kept) >= _MIN_ALPHABET and covered >= _COVERAGE * total
        if is_covered or entries > room:
            break
        kept.append(character)
        covered, room = covered + normal[character], room - entries
    if covered < _MIN_COVERAGE * total:
        entries = len(SPECIAL_TOKENS) + sum(1 + _continues(tokenizer, c) for c in ranked)
        raise DataError(
            f"corpus.tokenizer.vocab_size={vocab_size} is too small for the text's "
            f"{len(ranked):,} characters; use at least {entries + 1}, or "
            "corpus.tokenizer.kind=byte_bpe"
        )
    return sorted(kept)


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


def _byte_level(config: TokenizerConfig, texts: list[str]) -> Tokenizer:
    special = [
        # The space before a mask belongs to it, as in RoBERTa: it is that of the predicted word.
        AddedToken(token, special=True, lstrip=token == "[MASK]")
        for token in SPECIAL_TOKENS
    ]
    return _finish(
        train_byte_level(
            texts,
            vocab_size=config.vocab_size,
            min_frequency=config.min_frequency,
            lowercase=config.lowercase,
            special_tokens=special,
        ),
        special,
    )


_TRAINERS = {"wordpiece": _wordpiece, "words": _words, "byte_bpe": _byte_level}


def _finish(tokenizer: HfTokenizer, special: list[AddedToken] | None = None) -> Tokenizer:
    """Add the special tokens and the template `[CLS] text [SEP]`."""
    tokenizer.add_special_tokens(special or [AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    template = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")],
    )
    before = tokenizer.post_processor
    tokenizer.post_processor = processors.Sequence([before, template]) if before else template
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
