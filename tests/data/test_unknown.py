"""What a tokenizer can't express: how it is measured, warned of, refused and avoided."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raybert.data.scripts import share_without_spaces
from raybert.data.tokenizer import SPECIAL_TOKENS
from raybert.data.tokenizer_training import (
    TokenizerConfig,
    count_characters,
    make_tokenizer,
    train_tokenizer,
)
from raybert.data.unknown import (
    UnknownCount,
    check_unknown,
    count_unknown,
    count_unknown_of_sample,
    text_tokens,
)
from raybert.errors import DataError
from raybert.storage.folder import Folder

DRAW = random.Random(0)
HAN = [chr(0x4E00 + index) for index in range(3500)]
THAI_WORDS = [
    "".join(DRAW.choice("กขคงจชซญดตถทนบปผพมยรลวสหอ") + DRAW.choice("ะาิีุูั") for _ in range(3))
    for _ in range(120)
]
TEXTS = {
    "Han": ["".join(DRAW.choices(HAN, k=60)) for _ in range(300)],
    "Thai": ["".join(DRAW.choices(THAI_WORDS, k=29)) for _ in range(60)],
    "Khmer": ["".join(chr(0x1780 + DRAW.randrange(34)) for _ in range(150)) for _ in range(60)],
    "Japanese": [
        "私は" + "".join(DRAW.choices("あいうえおカキクケコ映画", k=40)) for _ in range(60)
    ],
    "English": [" ".join(DRAW.choices("a film was good bad".split(), k=12)) for _ in range(60)],
    "English and some Han": [
        f"the film {HAN[i]} was good and the plot was thin" for i in range(60)
    ],
}
SPACED = {"English", "English and some Han"}


@pytest.mark.parametrize("name", TEXTS)
def test_the_kind_follows_from_the_script_and_leaves_nothing_unknown(name):
    found = train_tokenizer(TokenizerConfig(), TEXTS[name])
    assert found.kind == ("wordpiece" if name in SPACED else "byte_bpe")
    assert found.unknown < 0.001
    encoded = found.tokenizer.encode(TEXTS[name])
    assert count_unknown(TEXTS[name], encoded, found.tokenizer).share == found.unknown


def test_text_that_wordpiece_can_not_express_makes_the_kind_byte_level():
    """Whatever the script: here words of 101 letters, which are longer than it reads."""
    texts = [" ".join("".join(DRAW.choices("abcdef", k=101)) for _ in range(4)) for _ in range(50)]
    assert train_tokenizer(TokenizerConfig(kind="wordpiece"), texts).unknown == 1.0
    found = train_tokenizer(TokenizerConfig(), texts)
    assert (found.kind, found.unknown) == ("byte_bpe", 0.0)
    # Bytes do not fit into so small a vocabulary.
    assert train_tokenizer(TokenizerConfig(vocab_size=100), texts).kind == "wordpiece"


@pytest.mark.parametrize("size", [1500, 3600, 8192])
def test_the_alphabet_follows_from_the_size_of_the_vocabulary(size):
    """Of 3,500 characters those that fit are kept, the most frequent ones, and the rest unknown."""
    weights = [1 / (rank + 1) for rank in range(len(HAN))]  # Zipf's law
    texts = ["".join(DRAW.choices(HAN, weights, k=60)) for _ in range(2000)]
    found = train_tokenizer(TokenizerConfig(kind="wordpiece", vocab_size=size), texts)
    counts = count_characters(texts)
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    kept = set(found.tokenizer.hf.get_vocab())
    room = min(size - len(SPECIAL_TOKENS), len(ranked))
    assert len(kept) <= size
    first_left_out = next((i for i, c in enumerate(ranked) if c not in kept), len(ranked))
    assert first_left_out >= min(room, 1000)
    assert not kept & set(ranked[first_left_out:])
    expected = sum(counts[c] for c in ranked[first_left_out:]) / sum(counts.values())
    assert found.unknown == pytest.approx(expected, abs=1e-9)
    assert (found.unknown < 0.001) == (size > 1500)


def test_an_alphabet_that_does_not_fit_at_all_is_refused():
    with pytest.raises(
        DataError, match=r"vocab_size=16 is too small .* use at least 34..,? or .*byte"
    ):
        make_tokenizer(TokenizerConfig(kind="wordpiece", vocab_size=16), TEXTS["Han"])
    with pytest.raises(ValueError, match="vocab_size=260 is too small for kind=byte_bpe.* 261"):
        TokenizerConfig(kind="byte_bpe", vocab_size=260)


BYTE_LEVEL = make_tokenizer(TokenizerConfig(kind="byte_bpe", vocab_size=300), TEXTS["English"])


@given(st.lists(st.text(max_size=40), max_size=4))
@settings(max_examples=300)
def test_bytes_express_every_text(texts):
    normal = [BYTE_LEVEL.hf.normalizer.normalize_str(text) for text in texts]
    rows = BYTE_LEVEL.encode(texts).split()
    assert [BYTE_LEVEL.hf.decode(row.tolist()) for row in rows] == normal
    assert count_unknown(texts, BYTE_LEVEL.encode(texts), BYTE_LEVEL).unknown_tokens == 0
    special = BYTE_LEVEL.is_special
    assert all(special[row].sum() == 2 for row in rows)


def test_tags_can_mark_each_ideograph():
    encoding = BYTE_LEVEL.hf.encode("我喜欢 the 電影", add_special_tokens=False)
    words = {}
    for word, span in zip(encoding.word_ids, encoding.offsets, strict=True):
        words[word] = (min(words.get(word, span)[0], span[0]), span[1])
    assert list(words.values()) == [(0, 1), (1, 2), (2, 3), (4, 7), (8, 9), (9, 10)]


@pytest.mark.parametrize("text", ["unknowable", "ж" * 300, "a жж b"])
def test_an_unknown_word_counts_with_its_characters(text):
    """A line without spaces is one unknown token, however long it is."""
    tokenizer = make_tokenizer(TokenizerConfig(kind="words", min_frequency=1), ["a b c"])
    texts = ["a b c", text]
    counted = count_unknown(texts, tokenizer.encode(texts), tokenizer)
    unknown = [word for word in text.split() if word not in ("a", "b")]
    assert counted.unknown_tokens == len(unknown)
    assert counted.unknown_chars == sum(map(len, unknown))
    assert (counted.tokens, counted.chars) == (3 + len(text.split()), 5 + len(text))
    shares = counted.unknown_tokens / counted.tokens, counted.unknown_chars / counted.chars
    assert counted.share == max(shares)
    assert count_unknown_of_sample(texts, tokenizer) == counted


def test_a_share_is_warned_of_from_one_percent_and_refused_from_twenty():
    assert check_unknown(None, "x", "y") is check_unknown(0.0099, "x", "y") is None
    assert check_unknown(0.01, "a.csv", "do this") == (
        "1.0% of a.csv is unknown to the tokenizer: do this"
    )
    assert "19.9% of" in check_unknown(0.199, "a.csv", "do this")
    with pytest.raises(DataError, match=r"20.0% of a.csv is unknown to the tokenizer; do this"):
        check_unknown(0.2, "a.csv", "do this")
    assert UnknownCount().share is None


def test_scripts_without_spaces():
    assert share_without_spaces(count_characters(["hello 12 !?"])) == 0
    assert share_without_spaces(count_characters(["ab中文"])) == 0.5
    assert share_without_spaces(count_characters(["123 -- "])) == 0
    for text in ("ภาษาไทย", "ພາສາລາວ", "ភាសាខ្មែរ", "မြန်မာ", "བོད", "ひらがな", "カタカナ", "漢字"):
        assert share_without_spaces(count_characters([text])) == 1, text
    for text in ("한국어", "Ελληνικά", "русский", "العربية", "हिन्दी", "ትግርኛ"):
        assert share_without_spaces(count_characters([text])) == 0, text


SPELLINGS = [*SPECIAL_TOKENS, "<s>", "</s>", "<mask>"]


@pytest.mark.parametrize("kind", ["wordpiece", "words", "byte_bpe"])
@given(
    pieces=st.lists(st.sampled_from([*SPELLINGS, "film", " ", ".", "中"]), max_size=8),
    glue=st.sampled_from(["", " "]),
)
@settings(max_examples=60)
def test_the_spelling_of_a_special_token_is_text(kind, pieces, glue):
    tokenizer = SPELLED[kind]
    ids = tokenizer.encode([glue.join(pieces)]).values
    unknown = -1 if tokenizer.unknown_id is None else tokenizer.unknown_id
    is_control = tokenizer.is_special & (np.arange(tokenizer.vocab_size) != unknown)
    assert np.flatnonzero(is_control[ids]).tolist() == [0, len(ids) - 1]
    assert text_tokens(tokenizer)[ids[1:-1]].all()


SPELLED = {
    kind: make_tokenizer(TokenizerConfig(kind=kind, vocab_size=400, min_frequency=1), texts)
    for kind, texts in dict.fromkeys(
        ("wordpiece", "words", "byte_bpe"), [*TEXTS["English"], "[sep] [cls] mask"]
    ).items()
}


def test_special_tokens_in_text_are_read_where_that_is_asked_for(tmp_path):
    config = TokenizerConfig(special_tokens_in_text=True)
    tokenizer = make_tokenizer(config, TEXTS["English"])
    tokenizer.save(Folder(tmp_path))
    for one in (tokenizer, type(tokenizer).load(Folder(tmp_path))):
        ids = one.encode(["a [SEP] film"]).values.tolist()
        assert ids.count(one.sep_id) == 2
        assert one.hash != make_tokenizer(TokenizerConfig(), TEXTS["English"]).hash
