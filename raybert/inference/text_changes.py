"""Changes of texts for behavioural tests (CheckList, arXiv 2005.04118): pure functions."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

#: Frequent given names; each is replaced by the next one of its row.
_NAMES = (
    ("James", "John", "Robert", "Michael", "David", "Peter", "Paul", "George", "Thomas", "Ahmed"),
    ("Mary", "Linda", "Sarah", "Anna", "Jane", "Julia", "Emma", "Alice", "Laura", "Fatima"),
)
_NEXT_NAME = {
    name: row[(at + 1) % len(row)] for row in _NAMES for at, name in enumerate(row)
}  # fmt: skip
_NAME = re.compile(rf"\b({'|'.join(_NEXT_NAME)})\b")
_INNER = re.compile(r"(?<![^\W\d_])[^\W\d_]{4,}(?![^\W\d_])")  # words with two inner letters
_END = ".!?。！？…"
#: Words of English that its neighbours do not have; every fifth word of its running text.
_ENGLISH = frozenset("the and to of that it this with for but not you are my have has they".split())
_ENGLISH_SHARE = 0.08
_WORDS_PER_TYPO = 20


def are_english(texts: Sequence[str]) -> bool:
    """Whether texts are English, by the share of frequent words."""
    words = re.findall(r"\w+", " ".join(texts).lower())
    return sum(word in _ENGLISH for word in words) >= max(1.0, _ENGLISH_SHARE * len(words))


def with_typos(text: str, seed: int = 0) -> str:
    """Swap two neighbouring letters inside of one word in 20, of at least one where there is one.

    First and last letters stay, as in most typing errors. The text decides with the seed.
    """
    words = [m for m in _INNER.finditer(text) if len(set(m[0][1:-1])) > 1]
    draw = random.Random(f"{seed} {text}")
    characters = list(text)
    for word in draw.sample(words, min(len(words), 1 + len(words) // _WORDS_PER_TYPO)):
        places = [i for i in range(word.start() + 1, word.end() - 2) if text[i] != text[i + 1]]
        at = draw.choice(places)
        characters[at], characters[at + 1] = characters[at + 1], characters[at]
    return "".join(characters)


def in_lower_case(text: str) -> str:
    """The text in lower case."""
    return text.lower()


def with_other_end(text: str) -> str:
    """Without its last punctuation mark, or with a full stop where it has none."""
    bare = text.rstrip()
    return bare[:-1] if bare[-1:] and bare[-1] in _END else f"{bare}."


def with_other_names(text: str) -> str:
    """Frequent given names replaced by others, the same one by the same one."""
    return _NAME.sub(lambda found: _NEXT_NAME[found[0]], text)


def with_sentence(text: str, sentence: str) -> str:
    """The text with a sentence behind it."""
    return f"{text.rstrip()} {sentence}"


def first_part(text: str, share: float) -> str:
    """About this share of the text, from its start: whole words where it has spaces."""
    if share >= 1:
        return text
    end = max(1, round(len(text) * share))
    space = text.rfind(" ", 1, end + 1)
    return text[: space if space > end // 2 else end]
