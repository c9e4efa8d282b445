"""The tokenizer: loading and saving one, and turning texts into ids.

`tokenizer.json` (of Hugging Face's `tokenizers`) is the one truth: special ids, the vocabulary and
where words start are read from it. `tokenizer_config.json` beside it only says which token plays
which role, so that `transformers.AutoTokenizer` gives the same ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator
from tokenizers import Tokenizer as HfTokenizer

from raybert.config import Settings
from raybert.data.word_cache import WordCache, splits_at_spaces
from raybert.errors import ConfigError, DamagedError, DataError
from raybert.storage.folder import Folder

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"

# What a role's token is called where `tokenizer_config.json` does not say.
_USUAL_NAMES = {
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
}
SPECIAL_TOKENS = [names[0] for names in _USUAL_NAMES.values()]

# Keras' TextVectorization, `strip_punctuation`, as a class of single characters.
STRIP_PATTERN = r"""[!"#$%&()\*\+,\-\./:;<=>?@\[\\\]^_`{|}~']"""


class TokenizerConfig(Settings):
    """Which tokenizer a corpus is made with."""

    kind: Literal["wordpiece", "words", "file"] = Field(
        "wordpiece",
        description="wordpiece: trained on the corpus; words: the most frequent words, lower-case "
        "and without punctuation, as Keras' TextVectorization; file: an existing tokenizer.json",
    )
    path: str | None = Field(
        None, description="of kind file: a tokenizer.json, or a folder that has one"
    )
    vocab_size: int = Field(8192, ge=16, description="tokens, the special ones included")
    lowercase: bool = Field(True, description="of kind wordpiece; accents go with the case")
    min_frequency: int = Field(2, ge=1, description="of a merge, or of a word")
    train_chars: int | None = Field(
        20_000_000,
        ge=1,
        description="characters to train on, at most: documents drawn by a hash of their text; "
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


class Ragged(NamedTuple):
    """Texts as ids, end to end. Text i holds values[offsets[i]:offsets[i + 1]]."""

    values: npt.NDArray[Any]  # [sum of lengths], the tokenizer's dtype
    offsets: npt.NDArray[np.int64]  # [B + 1]
    word_starts: npt.NDArray[np.bool_]  # [sum of lengths], True where a word starts


class Tokenizer:
    """A tokenizer with what raybert needs to know of it. Picklable."""

    def __init__(self, spec: str, config: dict[str, Any] | None = None, name: str = "") -> None:
        """Wrap the content of a `tokenizer.json` and of a `tokenizer_config.json`.

        Raises:
            DamagedError: it can't be parsed.
        """
        self.name = name or TOKENIZER_FILE
        try:
            self.hf = HfTokenizer.from_str(spec)
        except Exception as error:  # tokenizers raises bare Exception
            raise DamagedError(f"{self.name} is no tokenizer: {error}") from None
        # Cutting and filling to a length is the corpus's work and the model's, never the file's.
        self.hf.no_truncation()
        self.hf.no_padding()
        self._roles = {
            role: _content((config or {}).get(role)) or self._usual(role) for role in _USUAL_NAMES
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.to_json(), self._roles, self.name)

    @classmethod
    def load(cls, folder: Folder) -> Tokenizer:
        """Read the tokenizer of a corpus or model folder.

        Raises:
            DataError: there is none.
            DamagedError: it can't be parsed.
        """
        name = folder.join(TOKENIZER_FILE)
        try:
            spec = folder.read_text(TOKENIZER_FILE)
        except FileNotFoundError:
            raise DataError(f"{name}: no such file; name a folder with a tokenizer") from None
        except UnicodeDecodeError as error:
            raise DamagedError(f"{name} is no tokenizer: {error}") from None
        config = folder.read_json(CONFIG_FILE) if folder.exists(CONFIG_FILE) else None
        return cls(spec, config if isinstance(config, dict) else None, name)

    def save(self, folder: Folder) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`."""
        folder.write_text(TOKENIZER_FILE, self.to_json())
        folder.write_json(CONFIG_FILE, self.to_config())

    def to_json(self) -> str:
        """The content of `tokenizer.json`, in one canonical form."""
        return json.dumps(self.spec, ensure_ascii=False, indent=1, sort_keys=True) + "\n"

    def to_config(self, max_length: int | None = None) -> dict[str, Any]:
        """The content of `tokenizer_config.json`; `max_length` in tokens, where a model sets it."""
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{role: token for role, token in self._roles.items() if token is not None},
        }
        if max_length is not None:
            config["model_max_length"] = max_length
        return config

    @cached_property
    def spec(self) -> dict[str, Any]:
        """The parsed `tokenizer.json`."""
        return dict(json.loads(self.hf.to_str()))

    @cached_property
    def hash(self) -> str:
        """The sha256 of the canonical `tokenizer.json`, hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.hf.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The narrowest unsigned type that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @property
    def pad_id(self) -> int:
        """The id that fills rows up."""
        return self._id("pad_token")

    @property
    def unk_id(self) -> int:
        """The id of what is not in the vocabulary."""
        return self._id("unk_token")

    @property
    def cls_id(self) -> int:
        """The id that opens a document."""
        return self._id("cls_token")

    @property
    def sep_id(self) -> int:
        """The id that closes a document."""
        return self._id("sep_token")

    @property
    def mask_id(self) -> int:
        """The id that stands for a masked token."""
        return self._id("mask_token")

    @property
    def mask_token(self) -> str:
        """What stands for a masked token in a raw string."""
        self._id("mask_token")
        return str(self._roles["mask_token"])

    @cached_property
    def is_special(self) -> npt.NDArray[np.bool_]:
        """Per id, bool [V]: whether it is a special token rather than text."""
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
        """Per id, bool [V]: whether it starts a word; None where the id alone does not tell."""
        model = self.spec["model"]
        if model.get("type") == "WordLevel":
            return np.ones(self.vocab_size, np.bool_)
        if model.get("type") != "WordPiece":
            return None
        prefix = model.get("continuing_subword_prefix", "##")
        if not prefix:
            return None
        table = np.ones(self.vocab_size, np.bool_)
        for token, index in model["vocab"].items():
            table[index] = not token.startswith(prefix) or token == prefix
        return table

    def encode_batch(
        self, texts: Sequence[str], *, special: bool = True
    ) -> list[npt.NDArray[np.int32]]:
        """Turn texts into ids, int32 [length] each, neither cut nor filled.

        Args:
            texts: raw strings.
            special: whether the special tokens that the file's template sets stand around them.
        """
        ragged = self.encode(texts, special=special)
        return np.split(ragged.values.astype(np.int32), ragged.offsets[1:-1]) if texts else []

    def encode(self, texts: Sequence[str], *, special: bool = True) -> Ragged:
        """Turn texts into ids and word starts, end to end."""
        if not self._cache:
            return self._encode_plainly(texts, special)
        before, after = self._around if special else (b"", b"")
        joined = [before + ids + after for ids in self._cache.encode(texts)]
        values = np.frombuffer(b"".join(joined), self.dtype)
        lengths = np.fromiter(map(len, joined), np.int64, len(joined)) // self.dtype.itemsize
        starts = self.starts_by_id
        assert starts is not None  # the cache holds WordPiece and WordLevel only
        return Ragged(values, _offsets(lengths), starts[values])

    def _encode_plainly(self, texts: Sequence[str], special: bool) -> Ragged:
        by_id = self.starts_by_id
        ids: list[npt.NDArray[Any]] = []
        starts: list[npt.NDArray[np.bool_]] = []
        if by_id is not None:
            fast = self.hf.encode_batch_fast(list(texts), add_special_tokens=special)
            ids = [np.array(encoding.ids, self.dtype) for encoding in fast]
            starts = [by_id[one] for one in ids]
        else:  # only the slower encoding knows the words
            for encoding in self.hf.encode_batch(list(texts), add_special_tokens=special):
                ids.append(np.array(encoding.ids, self.dtype))
                words = [-1 if word is None else word for word in encoding.word_ids]
                starts.append(np.diff(np.array(words, np.int64), prepend=-2) != 0)
                starts[-1] |= np.array(words, np.int64) < 0
        lengths = np.array([len(one) for one in ids], np.int64)
        empty = [np.zeros(0, self.dtype)]
        return Ragged(
            np.concatenate(ids or empty),
            _offsets(lengths),
            np.concatenate(starts or [np.zeros(0, np.bool_)]),
        )

    @cached_property
    def _cache(self) -> WordCache | None:
        known = splits_at_spaces(self.spec, STRIP_PATTERN) and self.starts_by_id is not None
        return WordCache(self.hf, self.dtype) if known else None

    @cached_property
    def _around(self) -> tuple[bytes, bytes]:
        """The special ids that the template sets before and after a text."""
        encoding = self.hf.encode("")
        with_text = self.hf.encode("a")
        text = self.hf.encode("a", add_special_tokens=False)
        before = next(
            n
            for n in range(len(encoding.ids) + 1)
            if with_text.ids == encoding.ids[:n] + text.ids + encoding.ids[n:]
        )
        ids = np.array(encoding.ids, self.dtype)
        return ids[:before].tobytes(), ids[before:].tobytes()

    def _usual(self, role: str) -> str | None:
        return next((t for t in _USUAL_NAMES[role] if self.hf.token_to_id(t) is not None), None)

    def _id(self, role: str) -> int:
        token = self._roles[role]
        index = None if token is None else self.hf.token_to_id(token)
        if index is None:
            names = " or ".join(_USUAL_NAMES[role])
            raise ConfigError(
                f"{self.name}: the tokenizer has no {role} ({token or names}); use one that has, "
                "or corpus.tokenizer.kind=wordpiece"
            )
        return index


def load_file(path: str) -> Tokenizer:
    """Load a user's tokenizer: a `tokenizer.json`, or a folder that has one."""
    folder = Folder(path)
    if folder.path.endswith(".json"):
        parent, name = Folder.of_file(folder.uri)
        if name == TOKENIZER_FILE:
            return Tokenizer.load(parent)
        try:
            return Tokenizer(parent.read_text(name), None, path)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file") from None
    if not folder.exists(TOKENIZER_FILE):
        hub = " (names on a hub are not looked up: download it first)" if "/" in path else ""
        raise DataError(f"{folder / TOKENIZER_FILE}: no such file{hub}")
    return Tokenizer.load(folder)


def _content(token: Any) -> str | None:
    """A token of `tokenizer_config.json`: a string, or an object that holds it."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _offsets(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
