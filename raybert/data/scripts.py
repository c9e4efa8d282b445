"""Scripts that write words without spaces between them, by Unicode's script property."""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import Regex, normalizers

#: Each character is a word or a part of one, as line breaking treats them (UAX #14, class ID).
IDEOGRAPHIC = r"\p{Han}\p{Yi}"
#: Runs of letters that only a dictionary divides into words (UAX #14, classes SA and CJ).
_UNDIVIDED = (
    r"\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
    r"\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}\p{Javanese}\p{Balinese}"
)
_WITHOUT_SPACES = normalizers.Replace(Regex(f"[{IDEOGRAPHIC}{_UNDIVIDED}]"), "")


def share_without_spaces(counts: Mapping[str, int]) -> float:
    """The share of the letters, given the count of each character, in scripts without spaces."""
    letters = [character for character in counts if character.isalpha()]
    others = set(_WITHOUT_SPACES.normalize_str("".join(letters)))
    total = sum(counts[letter] for letter in letters)
    found = sum(counts[letter] for letter in letters if letter not in others)
    return found / total if total else 0.0
