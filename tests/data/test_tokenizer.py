"""The tokenizer: deterministic training, equal ids with and without cache, special tokens."""

import json
import os
import pickle
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from raybert.config import build
from raybert.data.encoding import WordCache, splits_at_spaces
from raybert.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from raybert.data.tokenizer_training import TokenizerConfig, draw_texts, load_file, make_tokenizer
from raybert.errors import ConfigError, DamagedError, DataError
from raybert.storage.folder import Folder

WORDS = "the a film movie was is not very good bad awful great plot actor scene watch watched it I"


def corpus(rows=400, seed=0):
    draw = random.Random(seed)
    words = WORDS.split() + ["un" + w for w in WORDS.split()] + ["café", "Ünter", "don't", "x-ray"]
    return [" ".join(draw.choices(words, k=20)).capitalize() + "." for _ in range(rows)]


WORDPIECE = make_tokenizer(TokenizerConfig(vocab_size=160), corpus())
CASED = make_tokenizer(TokenizerConfig(vocab_size=200, lowercase=False), corpus())
WORD_LEVEL = make_tokenizer(TokenizerConfig(kind="words", vocab_size=40), corpus())
BYTE_LEVEL = make_tokenizer(TokenizerConfig(kind="byte_bpe", vocab_size=400), corpus())


def byte_level() -> Tokenizer:
    hf = HfTokenizer(models.BPE(unk_token=None))
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    hf.train_from_iterator(corpus(), trainer)
    hf.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return Tokenizer(hf.to_str())


def plain(tokenizer, texts):
    return [e.ids for e in tokenizer.hf.encode_batch(texts)]


PIECES = st.sampled_from(
    [*WORDS.split(), "[MASK]", "[MASK].", "[CLS]", "x[SEP]y", "##a", "\u0301", "Å", "ﬁ", "電影",
     "İ", "ΑΣ", "\u200b", "\x00", "\u00a0", "\t", "\n", "  ", "e\u0301", "don't", "a" * 101]
)  # fmt: skip


@pytest.mark.parametrize(
    "tokenizer", [WORDPIECE, CASED, WORD_LEVEL], ids=["uncased", "cased", "words"]
)
@given(
    texts=st.lists(
        st.one_of(st.text(), st.lists(PIECES).map(" ".join), st.lists(PIECES).map("".join)),
        max_size=4,
    )
)
@example(texts=["the \u0301film", "a  b", " ", "", "film\u00a0film", "[MASK] [MASK]"])
@settings(max_examples=150, deadline=None)
def test_the_word_cache_gives_the_plain_ids(tokenizer, texts):
    assert tokenizer._cache is not None
    assert [ids.tolist() for ids in tokenizer.encode(texts).split()] == plain(tokenizer, texts)
    assert [e.ids for e in tokenizer.hf.encode_batch_fast(texts)] == plain(tokenizer, texts)


def test_the_word_cache_drops_old_words_and_stays_exact(monkeypatch):
    monkeypatch.setattr("raybert.data.encoding._MAX_ENTRIES", 20)
    cache = WordCache(WORDPIECE.hf, np.uint16)
    texts = corpus(60)
    for begin in range(0, 60, 3):
        expected = WORDPIECE.hf.encode_batch(texts[begin : begin + 3], add_special_tokens=False)
        got = cache.encode(texts[begin : begin + 3])
        assert [np.frombuffer(ids, np.uint16).tolist() for ids in got] == [e.ids for e in expected]
    assert len(cache._ids) + len(cache._older) < 200
    cache.encode(["z" * 60])
    assert "z" * 60 not in cache._ids


class NotIterable(dict):
    def __iter__(self):
        raise AssertionError("iterated over all entries of the cache")

    keys = items = values = __iter__


def test_a_single_text_does_not_iterate_over_the_cache():
    """The cache of a server has 100,000 words: iterating over them would cost every request."""
    cache = WordCache(WORDPIECE.hf, np.uint16)
    cache.encode(corpus(50))
    expected = cache.encode(["the film"])
    cache._ids = NotIterable(cache._ids)
    assert cache.encode(["the film"]) == expected
    assert cache.encode(["the newest film"])


def test_the_word_cache_is_thread_safe():
    texts, failures = corpus(200, seed=7), []
    fresh = Tokenizer(WORDPIECE.to_json())
    expected = plain(WORDPIECE, texts)

    def work(begin):
        got = fresh.encode(texts[begin : begin + 50]).split()
        if [ids.tolist() for ids in got] != expected[begin : begin + 50]:
            failures.append(begin)

    threads = [threading.Thread(target=work, args=(n % 4 * 50,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_components_that_depend_on_text_across_spaces_disable_the_cache():
    spec = WORDPIECE.spec
    assert splits_at_spaces(spec)
    for part, value in (
        ("pre_tokenizer", {"type": "Metaspace", "replacement": "_"}),
        ("pre_tokenizer", None),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "a b"}, "content": ""}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": ""}),
        ("model", {"type": "Unigram", "vocab": []}),
        ("added_tokens", [{**spec["added_tokens"][4], "lstrip": True}]),
        ("added_tokens", [{**spec["added_tokens"][4], "content": "two words"}]),
    ):
        assert not splits_at_spaces({**spec, part: value}), part
    assert byte_level()._cache is None


TRAINED = [
    TokenizerConfig(kind=kind, vocab_size=300, train_chars=20_000)
    for kind in ("wordpiece", "words", "byte_bpe")
]
HASHES = """
import json, sys
from raybert.data.tokenizer_training import TokenizerConfig, make_tokenizer
texts, *configs = map(json.loads, sys.stdin)
print([make_tokenizer(TokenizerConfig(**config), texts).hash for config in configs])
"""


def test_training_depends_only_on_the_set_of_texts():
    """In any order; also in a process with one thread and another hash seed."""
    texts = corpus(500)
    expected = [make_tokenizer(config, texts).hash for config in TRAINED]
    lines = [json.dumps(texts), *(config.model_dump_json() for config in TRAINED)]
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", HASHES]
    done = subprocess.run(
        command, input="\n".join(lines), env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(expected)
    random.Random(1).shuffle(texts)
    assert [make_tokenizer(config, iter(texts)).hash for config in TRAINED] == expected


@given(st.lists(st.text(max_size=30), max_size=30), st.integers(1, 200), st.randoms())
@settings(max_examples=300)
def test_drawn_texts_are_bounded_and_independent_of_the_order(texts, chars, random):
    drawn = draw_texts(texts, chars)
    assert sum(map(len, drawn)) <= chars or len(drawn) == 1
    random.shuffle(texts)
    assert draw_texts(iter(texts), chars) == drawn
    assert sorted(draw_texts(texts, None)) == sorted(texts)


def test_ids_come_from_the_file():
    for tokenizer in (WORDPIECE, WORD_LEVEL):
        vocab = tokenizer.hf.get_vocab()
        roles = {"[PAD]": "pad_id", "[CLS]": "cls_id", "[SEP]": "sep_id", "[MASK]": "mask_id"}
        assert [getattr(tokenizer, r) for r in roles.values()] == [vocab[t] for t in roles]
        assert np.flatnonzero(tokenizer.is_special).tolist() == sorted(
            vocab[t] for t in SPECIAL_TOKENS
        )
        assert tokenizer.vocab_size == len(vocab) <= 160
    assert byte_level().mask_id == 4
    assert byte_level().pad_id == 1
    assert byte_level().mask_token == "<mask>"


def test_a_tokenizer_without_a_mask_token_says_so():
    bare = Tokenizer(
        HfTokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).to_str()
    )
    assert bare._id("unk_token") == 1
    with pytest.raises(
        ConfigError, match=r"the tokenizer has no mask_token \(\[MASK\] or <mask>\)"
    ):
        _ = bare.mask_id


def test_wordpiece_case_and_vocabulary():
    ids = WORDPIECE.encode_masked("Good [MASK] unfilm")
    tokens = [WORDPIECE.hf.id_to_token(i) for i in ids]
    assert tokens[:3] == ["[CLS]", "good", "[MASK]"] and tokens[-1] == "[SEP]"
    assert "G" in CASED.hf.get_vocab() and "G" not in WORDPIECE.hf.get_vocab()
    assert "##." not in WORDPIECE.hf.get_vocab()  # punctuation never continues a word
    assert WORDPIECE.hf.decode(ids.tolist()) == "good unfilm"
    with pytest.raises(DataError, match=r"vocab_size=16 is too small for the text's \d+"):
        make_tokenizer(TokenizerConfig(vocab_size=16), corpus())
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        make_tokenizer(TokenizerConfig(), [])


def test_words_standardize_as_keras_does():
    texts = ['Good, good: "FILM"! (a_b) don\'t [brackets] new-line\nnext\ttab', "good film", "rare"]
    tokenizer = make_tokenizer(TokenizerConfig(kind="words", vocab_size=16, min_frequency=1), texts)
    kept = sorted(tokenizer.hf.get_vocab(), key=tokenizer.hf.get_vocab().get)
    assert kept == [
        *SPECIAL_TOKENS, "good", "film", "ab", "brackets", "dont", "newline", "next", "rare", "tab",
    ]  # fmt: skip
    ids = tokenizer.encode_masked("This [MASK] is GOOD.").tolist()[1:-1]
    unknown = tokenizer.hf.token_to_id("[UNK]")
    assert ids == [unknown, tokenizer.mask_id, unknown, 5]
    small = make_tokenizer(TokenizerConfig(kind="words", vocab_size=16), texts)
    assert set(small.hf.get_vocab()) == {*SPECIAL_TOKENS, "good", "film"}  # min_frequency is 2


def test_word_starts_agree_with_the_encodings_word_ids():
    for tokenizer in (WORDPIECE, WORD_LEVEL, byte_level()):
        texts = [
            "Unfilm was unwatched, [MASK]? qqq" if tokenizer.mask_id < 4 else "a unfilm",
            "",
            "a",
        ]
        ragged = tokenizer.encode(texts)
        encodings = tokenizer.hf.encode_batch(texts)
        assert ragged.offsets.tolist() == np.cumsum([0, *map(len, encodings)]).tolist()
        for index, encoding in enumerate(encodings):
            part = ragged.word_starts[ragged.offsets[index] : ragged.offsets[index + 1]]
            words = encoding.word_ids
            expected = [
                word is None or at == 0 or words[at - 1] != word for at, word in enumerate(words)
            ]
            assert part.tolist() == expected


def test_save_load_pickle_and_transformers_give_the_same_ids(tmp_path):
    transformers = pytest.importorskip("transformers")
    texts = ["I have watched this film and it was awesome.", "", "unfilm café 電影"]
    for number, tokenizer in enumerate((WORDPIECE, CASED, WORD_LEVEL, BYTE_LEVEL, byte_level())):
        folder = Folder(tmp_path / str(number))
        tokenizer.save(folder)
        expected = [ids.tolist() for ids in tokenizer.encode(texts).split()]
        again = Tokenizer.load(folder)
        assert again.hash == tokenizer.hash
        assert again.to_json() == folder.read_text("tokenizer.json")
        for other in (again, pickle.loads(pickle.dumps(tokenizer)), load_file(folder.path)):
            assert [ids.tolist() for ids in other.encode(texts).split()] == expected
            assert other.mask_id == tokenizer.mask_id
        theirs = transformers.AutoTokenizer.from_pretrained(folder.path)
        assert theirs(texts)["input_ids"] == expected
        for masked in ("this {} was", "{}", "film {} {}. ", "a{}b"):
            text = masked.replace("{}", tokenizer.mask_token)
            assert theirs(text)["input_ids"] == tokenizer.encode_masked(text).tolist()
            as_text = theirs(text, split_special_tokens=True)["input_ids"]
            assert tokenizer.encode([text]).values.tolist() == as_text
        assert (theirs.mask_token_id, theirs.pad_token_id) == (tokenizer.mask_id, tokenizer.pad_id)
        theirs.save_pretrained(tmp_path / "theirs")
        back = load_file(str(tmp_path / "theirs"))
        assert [ids.tolist() for ids in back.encode(texts).split()] == expected


def test_a_files_truncation_and_padding_are_ignored():
    hf = HfTokenizer.from_str(WORDPIECE.to_json())
    hf.enable_truncation(4)
    hf.enable_padding(length=9)
    tokenizer = Tokenizer(hf.to_str())
    assert tokenizer.hash == WORDPIECE.hash
    assert len(tokenizer.encode(["a b c d e f g"]).split()[0]) == 9


@pytest.mark.parametrize(
    "config", [{}, {"do_lower_case": False}, {"strip_accents": False, "unk_token": "[MASK]"}]
)
def test_a_vocabulary_gives_the_ids_of_transformers(tmp_path, config):
    from transformers import BertTokenizer

    words = "a the was film superb sup ##erb ##s 文 é e caf ##é ##e Film ! ##! - 1 ##2".split()
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(Folder(tmp_path))
    theirs = BertTokenizer.from_pretrained(tmp_path)
    texts = [
        "A Film was SUPERB!",
        "café, cafe 文文 12 xyz",
        "",
        "a [MASK] film",
        "e\u0301 \ufffd\t!!",
    ]
    for text in texts:
        spelled = tokenizer.with_special_tokens_in_text()  # as transformers reads every text
        assert spelled.hf.encode(text).ids == theirs(text)["input_ids"], text
    assert tokenizer.hf.encode(texts[0], texts[1]).ids == theirs(texts[0], texts[1])["input_ids"]
    assert load_file(str(tmp_path / "vocab.txt")).hash == tokenizer.hash
    tokenizer.save(Folder(tmp_path / "saved"))
    assert Tokenizer.load(Folder(tmp_path / "saved")).hash == tokenizer.hash


def test_a_vocabulary_without_special_tokens_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(DamagedError, match=r"vocab.txt is no tokenizer: it lacks .* '\[UNK\]'"):
        Tokenizer.load(Folder(tmp_path))


def test_missing_and_damaged_tokenizers_are_named(tmp_path):
    folder = Folder(tmp_path)
    with pytest.raises(DataError, match=f"{tmp_path}/tokenizer.json: no such file"):
        Tokenizer.load(folder)
    with pytest.raises(DataError, match="names on a hub are not looked up"):
        load_file("bert/base-uncased")
    folder.write_text("tokenizer.json", WORDPIECE.to_json()[:500])
    with pytest.raises(DamagedError, match="tokenizer.json is no tokenizer"):
        Tokenizer.load(folder)
    for values, message in (
        ({"kind": "file"}, "kind=file needs path"),
        ({"path": "x"}, "path=x goes with kind=file"),
        ({"kind": "words", "lowercase": False}, "lowercase=false goes with kind=wordpiece"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(TokenizerConfig, values, "c.yaml")


def test_the_config_file_assigns_the_roles(tmp_path):
    folder = Folder(tmp_path)
    spec = json.loads(WORDPIECE.to_json())
    for token in spec["added_tokens"]:
        token["content"] = token["content"].replace("[MASK]", "@")
    spec["model"]["vocab"]["@"] = spec["model"]["vocab"].pop("[MASK]")
    folder.write_text("tokenizer.json", json.dumps(spec))
    with pytest.raises(ConfigError, match="no mask_token"):
        _ = Tokenizer.load(folder).mask_id
    folder.write_json("tokenizer_config.json", {"mask_token": {"content": "@", "lstrip": True}})
    assert Tokenizer.load(folder).mask_id == WORDPIECE.mask_id
    assert load_file(folder.join("tokenizer.json")).mask_token == "@"
