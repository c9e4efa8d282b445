"""New words for a tokenizer of WordPiece."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import reviews, tokenizer_of

from raybert.config import build
from raybert.data.tokenizer_training import TokenizerConfig, make_tokenizer
from raybert.errors import ConfigError
from raybert.storage.folder import Folder

TEXTS = [text for text, _ in reviews(80)]
OLD = make_tokenizer(TokenizerConfig(kind="wordpiece", vocab_size=120), TEXTS)


def extended(folder, texts, count, **settings):
    OLD.save(folder)
    config = TokenizerConfig(kind="file", path=folder.uri, new_words=count, **settings)
    return make_tokenizer(config, texts)


def words_of(texts):
    return Counter(word for text in texts for word in text.lower().split())


@given(
    texts=st.lists(st.text("abcdeé XZ", max_size=60), min_size=1, max_size=8),
    count=st.integers(0, 6),
    frequency=st.integers(1, 3),
)
def test_the_most_frequent_split_words_become_tokens(tmp_path_factory, texts, count, frequency):
    folder = Folder(tmp_path_factory.getbasetemp() / "extended")
    new = extended(folder, texts, count, min_frequency=frequency)
    words = new.words_beyond(OLD)
    assert len(words) <= count
    normal = words_of(OLD.hf.normalizer.normalize_str(text) for text in texts)
    for word, pieces in words.items():
        assert normal[word] >= frequency
        assert len(new.hf.encode(word, add_special_tokens=False).ids) == 1
        assert pieces == OLD.hf.encode(word, add_special_tokens=False).ids
        assert len(pieces) > 1 or pieces == [OLD.unknown_id]
    rare = [word for word in normal if OLD.hf.token_to_id(word) is None and word not in words]
    if len(words) == count and rare and words:
        assert max(normal[word] for word in rare) <= min(normal[word] for word in words)
    # WordPiece takes the longest token that a word begins with.
    others = [word for word in [*normal, *words_of(TEXTS)] if not word.startswith(tuple(words))]
    for before, after in zip(OLD.encode(others).split(), new.encode(others).split(), strict=True):
        assert before.tolist() == after.tolist()


def test_another_tokenizer_is_no_extension():
    assert tokenizer_of(TEXTS).words_beyond(OLD) is None
    assert OLD.words_beyond(OLD) == {}
    assert OLD.words_beyond(OLD.with_words(["superbly"])) is None


def test_tokenizers_of_another_kind_are_not_extended(tmp_path):
    folder = Folder(tmp_path)
    tokenizer_of(TEXTS).save(folder)
    config = TokenizerConfig(kind="file", path=folder.uri, new_words=3)
    with pytest.raises(ConfigError, match="new_words=3 extends WordPiece, and .* is WordLevel"):
        make_tokenizer(config, TEXTS)
    with pytest.raises(ConfigError, match="new_words=3 goes with kind=file, not auto"):
        build(TokenizerConfig, {"new_words": 3}, "test")
