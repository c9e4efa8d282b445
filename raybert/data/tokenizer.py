"""The tokenizer of a corpus or model: load and save it, and turn texts into ids.

`tokenizer.json`, of Hugging Face's `tokenizers`, is all that ids depend on; `tokenizer_config.json`
assigns roles to special tokens, so that `transformers.AutoTokenizer` gives the same ids.

The spelling of a special token in a text, as `[SEP]` in a page on BERT, is text: otherwise a
document could contain the ids that divide documents. `encode_masked` is for texts with masks.
`transformers` reads such spellings so with `split_special_tokens=True`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as HfTokenizer

from raybert.data.encoding import (
    PairTemplate,
    Ragged,
    WordCache,
    encode_plain,
    id_dtype,
    offsets_of,
    pair_template,
    splits_at_spaces,
    undefined_special_tokens,
    word_start_table,
)
from raybert.data.vocab_file import VOCAB_FILE, wordpiece_of
from raybert.errors import ConfigError, DamagedError, DataError, RaybertError, one_line
from raybert.storage.folder import Folder

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"

# The names of a role's token where `tokenizer_config.json` does not assign one.
_USUAL_NAMES = {
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
}
_MAX_UNUSED_IDS = 10_000  # beside as many as there are tokens
#: Texts that use each part of a tokenizer: words, digits, other scripts, unknown characters.
_PROBES = ["", " ", "A probe, with naïve words: 1234! \t\n", "не 文字 \U0001f600 \u0e01 \uffff"]
SPECIAL_TOKENS = [names[0] for names in _USUAL_NAMES.values()]
_SPELLED = "special_tokens_in_text"  # a key of `tokenizer_config.json`: they are tokens in a text


class Tokenizer:
    """A Hugging Face tokenizer with the roles of its special tokens. Picklable."""

    def __init__(self, spec: str, config: dict[str, Any] | None = None, name: str = "") -> None:
        """Wrap the content of a `tokenizer.json` and of a `tokenizer_config.json`."""
        self.name = name or TOKENIZER_FILE
        try:
            self.hf = HfTokenizer.from_str(spec)
        except Exception as error:  # tokenizers raises bare Exception
            raise DamagedError(f"{self.name} is no tokenizer: {one_line(error)}") from None
        # The corpus and the model truncate and pad; the file's settings for both are ignored.
        self.hf.no_truncation()
        self.hf.no_padding()
        self._check_ids()
        unknown = undefined_special_tokens(self.spec.get("post_processor"))
        if unknown:  # the first text would panic
            raise DamagedError(
                f"{self.name} is damaged: its template uses the special token {unknown[0]!r} and "
                "does not define it"
            )
        self._are_spelled = bool((config or {}).get(_SPELLED))
        self.hf.encode_special_tokens = not self._are_spelled
        self._roles = {
            role: _content((config or {}).get(role))
            or next((name for name in names if self.hf.token_to_id(name) is not None), None)
            for role, names in _USUAL_NAMES.items()
        }

    def _check_ids(self) -> None:
        """Raise DamagedError for an id that is far above the others: tables over all are made."""
        found = self.hf.get_vocab(with_added_tokens=True)
        token, largest = max(found.items(), key=itemgetter(1), default=("", -1))
        if largest >= 2 * len(found) + _MAX_UNUSED_IDS:
            raise DamagedError(
                f"{self.name} is damaged: of {len(found)} tokens, {token!r} has the id {largest}"
            )
        self._largest_id = largest

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.to_json(), self._config, self.name)

    @property
    def _config(self) -> dict[str, Any]:
        return {**self._roles, **({_SPELLED: True} if self._are_spelled else {})}

    def with_special_tokens_in_text(self) -> Tokenizer:
        """The same tokenizer, for which the spelling of a special token in a text is that token."""
        return Tokenizer(self.to_json(), {**self._config, _SPELLED: True}, self.name)

    def with_words(self, words: Sequence[str]) -> Tokenizer:
        """The same WordPiece tokenizer with more words, whose ids follow the others."""
        new = {word: self.vocab_size + number for number, word in enumerate(words)}
        model = self.spec["model"]
        spec = {**self.spec, "model": {**model, "vocab": {**model["vocab"], **new}}}
        return Tokenizer(json.dumps(spec), self._config, self.name)

    def words_beyond(self, other: Tokenizer) -> dict[str, list[int]] | None:
        """The words that `with_words` added to another tokenizer, and their ids in that one.

        None: this one is not another one with more words.
        """
        mine, theirs = self.hf.get_vocab(), other.hf.get_vocab()
        new = {word: index for word, index in mine.items() if word not in theirs}
        is_same = all(mine.get(word) == index for word, index in theirs.items())
        if not is_same or min(new.values(), default=other.vocab_size) < other.vocab_size:
            return None
        encode = other.hf.encode
        return {word: encode(word, add_special_tokens=False).ids for word in new}

    @classmethod
    def load(cls, folder: Folder) -> Tokenizer:
        """Read the tokenizer of a corpus or model folder; a DataError where there is none."""
        name = folder.join(TOKENIZER_FILE)
        config = folder.read_json(CONFIG_FILE) if folder.exists(CONFIG_FILE) else {}
        config = config if isinstance(config, dict) else {}
        try:
            if not folder.exists(TOKENIZER_FILE) and folder.exists(VOCAB_FILE):
                name = folder.join(VOCAB_FILE)
                usual = {role: names[0] for role, names in _USUAL_NAMES.items()}
                special = {role: _content(config.get(role)) or usual[role] for role in usual}
                spec = wordpiece_of(folder.read_text(VOCAB_FILE), config, special)
            else:
                spec = folder.read_text(TOKENIZER_FILE)
        except FileNotFoundError:
            raise DataError(f"{name}: no such file; name a folder with a tokenizer") from None
        except ValueError as error:  # also what is not UTF-8
            raise DamagedError(f"{name} is no tokenizer: {one_line(error)}") from None
        return cls(spec, config, name)

    @staticmethod
    def exists(folder: Folder) -> bool:
        """Whether a folder has the files of a tokenizer."""
        return folder.exists(TOKENIZER_FILE) or folder.exists(VOCAB_FILE)

    def check(self, vocab_size: int) -> None:
        """Raise DamagedError unless texts become ids below `vocab_size`, the model's."""
        if self.vocab_size > vocab_size:
            raise DamagedError(
                f"{self.name} has {self.vocab_size} tokens and the model knows {vocab_size}; take "
                "the tokenizer that belongs to the model"
            )
        try:
            largest = int(self.encode(_PROBES).values.max(initial=0))
            self.hf.encode_batch(_PROBES)  # which tasks on tokens use
            largest = max(largest, self.pad_id, *self.hf.encode(_PROBES[2], _PROBES[3]).ids)
        except (RaybertError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # as which tokenizers raises a panic
            raise DamagedError(
                f"{self.name} is damaged: it tokenizes no text ({one_line(error)})"
            ) from None
        if largest >= vocab_size:
            raise DamagedError(
                f"{self.name} is damaged: it gives the id {largest}, and the model knows "
                f"{vocab_size} tokens"
            )

    def save(self, folder: Folder) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`."""
        folder.write_text(TOKENIZER_FILE, self.to_json())
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{key: value for key, value in self._config.items() if value is not None},
        }
        folder.write_json(CONFIG_FILE, config)

    def to_json(self) -> str:
        """The content of `tokenizer.json` in a canonical form."""
        return json.dumps(self.spec, ensure_ascii=False, indent=1, sort_keys=True) + "\n"

    @cached_property
    def spec(self) -> dict[str, Any]:
        """The parsed `tokenizer.json`."""
        return dict(json.loads(self.hf.to_str()))

    @cached_property
    def hash(self) -> str:
        """The sha256 of the canonical `tokenizer.json`, hexadecimal."""
        spelled = _SPELLED.encode() if self._are_spelled else b""
        return hashlib.sha256(self.to_json().encode() + spelled).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._largest_id + 1

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The narrowest unsigned type that holds every id."""
        return id_dtype(self.vocab_size)

    @property
    def pad_id(self) -> int:
        """The id of padding."""
        return self._id("pad_token")

    @property
    def cls_id(self) -> int:
        """The id at the beginning of a document."""
        return self._id("cls_token")

    @property
    def sep_id(self) -> int:
        """The id at the end of a document."""
        return self._id("sep_token")

    @property
    def mask_id(self) -> int:
        """The id of a masked token."""
        return self._id("mask_token")

    @property
    def mask_token(self) -> str:
        """The mask token as it is written in a raw string."""
        self._id("mask_token")
        return str(self._roles["mask_token"])

    @cached_property
    def unknown_id(self) -> int | None:
        """The id of what the vocabulary can't express; None: it can express every text."""
        model = self.spec["model"]
        if model.get("type") == "Unigram":
            return None if model.get("byte_fallback") else model.get("unk_id")
        token = model.get("unk_token")
        return None if token is None else self.hf.token_to_id(token)

    @cached_property
    def is_special(self) -> npt.NDArray[np.bool_]:
        """For each id, bool [V], whether it is a special token rather than text."""
        table = np.zeros(self.vocab_size, np.bool_)
        for index, token in self.hf.get_added_tokens_decoder().items():
            table[index] = token.special
        for name in self._roles.values():
            role_id = None if name is None else self.hf.token_to_id(name)
            if role_id is not None:
                table[role_id] = True
        return table

    @cached_property
    def starts_by_id(self) -> npt.NDArray[np.bool_] | None:
        """For each id, bool [V], whether it starts a word; None where that depends on the text."""
        return word_start_table(self.spec, self.vocab_size)

    def encode(self, texts: Sequence[str]) -> Ragged:
        """Turn texts into ids, special tokens included, and word starts, concatenated."""
        try:
            return self._encode(texts)
        except TypeError:  # of the library, which takes no lone surrogates
            check_unicode(texts)
            raise

    def _encode(self, texts: Sequence[str]) -> Ragged:
        starts = self.starts_by_id
        if self._cache is None or starts is None:
            return encode_plain(self.hf, texts, self.dtype, starts)
        before, after = (np.array(ids, self.dtype).tobytes() for ids in self.template)
        joined = [before + ids + after for ids in self._cache.encode(texts)]
        values = np.frombuffer(b"".join(joined), self.dtype)
        lengths = np.fromiter(map(len, joined), np.int64, len(joined)) // self.dtype.itemsize
        return Ragged(values, offsets_of(lengths), starts[values])

    def encode_masked(self, text: str) -> npt.NDArray[np.int64]:
        """The ids of a text in which the mask token's spelling is a mask, [T]."""
        mask = self.hf.get_added_tokens_decoder().get(self.mask_id)
        parts = text.split(self.mask_token)
        if mask is not None and mask.lstrip:  # it includes the spaces before it
            parts = [part.rstrip() for part in parts[:-1]] + parts[-1:]
        if mask is not None and mask.rstrip:
            parts = parts[:1] + [part.lstrip() for part in parts[1:]]
        before, after = self.template
        ids = list(before)
        for number, part in enumerate(parts):
            ids += [self.mask_id] if number else []
            ids += self.hf.encode(part, add_special_tokens=False).ids
        return np.array([*ids, *after], np.int64)

    def token_text(self, index: int) -> str:
        """A token as people read it."""
        decoder = (self.spec.get("decoder") or {}).get("type")
        token = str(self.hf.id_to_token(index))
        if decoder != "ByteLevel" or self.is_special[index]:
            return token
        text = self.hf.decode([index]).strip()
        return token if not text or "\ufffd" in text else text  # a part of a character

    @cached_property
    def pair_template(self) -> PairTemplate:
        """The special ids around two texts: `[CLS] a [SEP] b [SEP]`, or the file's own."""
        found = pair_template(self.hf)
        return found or PairTemplate([self.cls_id], [self.sep_id], [self.sep_id])

    @cached_property
    def _cache(self) -> WordCache | None:
        is_exact = splits_at_spaces(self.spec) and self.starts_by_id is not None
        return WordCache(self.hf, self.dtype) if is_exact else None

    @cached_property
    def template(self) -> tuple[list[int], list[int]]:
        """The special ids before and after a text."""
        empty, with_text = self.hf.encode("").ids, self.hf.encode("a").ids
        text = self.hf.encode("a", add_special_tokens=False).ids
        for n in range(len(empty) + 1):
            if with_text == empty[:n] + text + empty[n:]:
                return empty[:n], empty[n:]
        raise DamagedError(f"{self.name} is damaged: its special tokens are not around the text")

    def _id(self, role: str) -> int:
        token = self._roles[role]
        index = None if token is None else self.hf.token_to_id(token)
        if index is None:
            names = " or ".join(_USUAL_NAMES[role]) if token is None else repr(token)
            raise ConfigError(
                f"{self.name}: the tokenizer has no {role} ({names}); use one that has, "
                "or corpus.tokenizer.kind=wordpiece"
            )
        return index


def _content(token: Any) -> str | None:
    """A token of `tokenizer_config.json`, which is a string or an object with the string."""
    if isinstance(token, dict):
        token = token.get("content")
    is_text = isinstance(token, str) and not any("\ud800" <= c <= "\udfff" for c in token)
    return token if is_text else None


def check_unicode(texts: Sequence[str]) -> None:
    """Raise DataError for a text with a lone surrogate, as bytes that are not UTF-8 become."""
    for number, text in enumerate(texts, 1):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"text {number} is not UTF-8: its character {error.start + 1} is "
                f"{text[error.start]!a}; convert it"
            ) from None
