"""Corpora: packing, duplicates, and whole builds on Ray."""

import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybert.data.corpus import build as build_module
from raybert.data.corpus import tokenize_job
from raybert.data.corpus.build import Progress, build, existing
from raybert.data.corpus.corpus_writer import HELDOUT, TRAIN, DigestSet, Packer, unigram_loss
from raybert.data.corpus.manifest import Manifest
from raybert.data.corpus.parts import PartReader
from raybert.data.corpus.settings import CorpusConfig
from raybert.data.sources.settings import SourceConfig
from raybert.data.tokenizer import Tokenizer
from raybert.data.tokenizer_training import TokenizerConfig
from raybert.errors import DataError, UserError
from raybert.storage.folder import Folder

WORDS = "film movie plot actor scene good bad great awful slow fast long warm cold dull".split()


def reviews(rows=600, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 60))) + "." for _ in range(rows)]


class Rows:
    """Collects the rows that a packer writes."""

    def __init__(self):
        self.ids, self.starts = [], []

    def append(self, input_ids, word_starts):
        self.ids.append(input_ids.copy())
        self.starts.append(word_starts.copy())


@given(
    documents=st.lists(st.lists(st.integers(1, 99), max_size=30), max_size=30),
    seq_len=st.integers(1, 16),
    blocks=st.integers(1, 7),
)
def test_packed_rows_do_not_depend_on_how_add_divides_the_stream(documents, seq_len, blocks):
    rows = Rows()
    packer = Packer(rows, seq_len=seq_len, pad_id=0, vocab_size=100)
    for begin in range(0, len(documents), blocks):
        some = documents[begin : begin + blocks]
        ids = np.array([i for document in some for i in document], np.uint16)
        packer.add(ids, ids % 2 == 0, len(some))
    packer.close()
    stream = [i for document in documents for i in document]
    assert packer.documents == len(documents)
    assert packer.tokens == len(stream)
    assert Counter(dict(enumerate(packer.counts.tolist()))) + Counter() == Counter(stream)
    if not stream:
        assert rows.ids == []
        return
    ids = np.concatenate(rows.ids)
    assert ids.shape == (-(-len(stream) // seq_len), seq_len)
    assert ids.ravel().tolist() == stream + [0] * (ids.size - len(stream))
    assert np.array_equal(np.concatenate(rows.starts), ids % 2 == 0)  # 0, the padding, is even


@given(st.lists(st.lists(st.integers(0, 40), max_size=12), max_size=20))
def test_a_digest_is_new_once(batches):
    digests, seen = DigestSet(), set()
    for batch in batches:
        got = digests.add(np.array(batch, np.uint64))
        for value, new in zip(batch, got.tolist(), strict=True):
            assert new == (value not in seen)
            seen.add(value)
    held = digests.holds(np.arange(41, dtype=np.uint64)).tolist()
    assert held == [value in seen for value in range(41)]


def test_the_unigram_loss_equals_a_value_computed_by_hand():
    special = np.array([True, False, False])
    loss = unigram_loss(np.array([9, 2, 0]), np.array([5, 1, 1]), special)
    assert loss == pytest.approx(-(math.log(3 / 4) + math.log(1 / 4)) / 2)
    assert unigram_loss(np.array([9, 2, 0]), np.array([5, 0, 0]), special) is None


# --- Whole builds on Ray


def settings_for(path, **changes) -> CorpusConfig:
    source = {"path": str(path), **changes.pop("source", {})}
    values = {
        "source": source,
        "tokenizer": {"vocab_size": 120, **changes.pop("tokenizer", {})},
        "seq_len": 32,
        "heldout_fraction": 0.1,
        "rows_per_part": 64,
        "rows_per_group": 16,
    }
    return CorpusConfig.model_validate({**values, **changes})


def write_lines(path: Path, texts) -> Path:
    path.write_text("".join(text + "\n" for text in texts))
    return path


def rows_of(folder: Folder, manifest: Manifest, split: str):
    reader = PartReader(folder, manifest, split)
    reader.check()
    return reader.read_rows(np.arange(reader.rows))


def documents_of(folder: Folder, manifest: Manifest, split: str) -> list[tuple[int, ...]]:
    """The documents of a split as ids without their special tokens."""
    tokenizer = Tokenizer.load(folder)
    stream = rows_of(folder, manifest, split).input_ids.ravel()
    stream = stream[: manifest.info["tokens"][split]].tolist()
    assert stream[0] == tokenizer.cls_id and stream[-1] == tokenizer.sep_id
    documents, current = [], []
    for index in stream:
        if index == tokenizer.sep_id:
            documents.append(tuple(current))
        elif index == tokenizer.cls_id:
            current = []
        else:
            current.append(index)
    return documents


def part_bytes(folder: Folder) -> dict[str, bytes]:
    other = ("manifest.json", "attempts")
    return {n: folder.read_bytes(n) for n in folder.names() if n not in other}


def small_blocks(monkeypatch, size):
    """Divide the work into many small tasks, so that an error in their order would show."""
    monkeypatch.setattr(tokenize_job, "_BLOCK_BYTES", size)


@pytest.fixture(scope="module")
def built(ray_session, tmp_path_factory):
    base = tmp_path_factory.mktemp("built")
    texts = reviews()
    for number in range(3):
        write_lines(base / f"{number}.txt", texts[number::3])
    config = settings_for(base / "*.txt")
    steps: list[Progress] = []
    folder = Folder(base / "corpus")
    manifest = build(config, folder, progress=steps.append)
    return config, folder, manifest, [t for n in range(3) for t in texts[n::3]], steps


@pytest.mark.ray
def test_every_document_is_in_one_split_in_order(built):
    config, folder, manifest, texts, _ = built
    tokenizer = Tokenizer.load(folder)
    expected = [tuple(ids.tolist()[1:-1]) for ids in tokenizer.encode(texts).split()]
    train, heldout = (documents_of(folder, manifest, split) for split in (TRAIN, HELDOUT))
    assert sorted(train + heldout) == sorted(expected)
    held = set(heldout)
    assert train == [ids for ids in expected if ids not in held]
    assert heldout == [ids for ids in expected if ids in held]
    assert 30 <= len(heldout) <= 90  # 60 of 600 expected
    assert manifest.info["documents"] == {TRAIN: len(train), HELDOUT: len(heldout)}
    assert manifest.info["tokens"][TRAIN] == sum(len(ids) + 2 for ids in train)
    rows = rows_of(folder, manifest, TRAIN)
    assert np.array_equal(rows.word_starts, tokenizer.starts_by_id[rows.input_ids])


@pytest.mark.ray
def test_the_manifest_describes_the_corpus(built):
    config, folder, manifest, texts, steps = built
    tokenizer = Tokenizer.load(folder)
    assert manifest == Manifest.read(folder)
    assert (manifest.tokenizer_hash, manifest.vocab_size) == (tokenizer.hash, tokenizer.vocab_size)
    assert (manifest.seq_len, manifest.dtype) == (32, "uint16")
    info = manifest.info
    assert info["config"] == json.loads(config.model_dump_json())
    assert (info["documents_read"], info["duplicates"], info["skipped"]) == (600, 0, {})
    assert info["overlap"] is None
    assert 0 < info["unigram_loss"] < math.log(tokenizer.vocab_size)
    counts = [np.zeros(tokenizer.vocab_size, int) for _ in range(2)]
    for count, split in zip(counts, (TRAIN, HELDOUT), strict=True):
        np.add.at(count, rows_of(folder, manifest, split).input_ids.ravel(), 1)
    assert info["unigram_loss"] == pytest.approx(unigram_loss(*counts, tokenizer.is_special))
    assert set(info["versions"]) == {"raybert", "ray", "tokenizers", "pyarrow"}
    assert [part.rows for part in manifest.splits[TRAIN].parts[:-1]] == [64] * (
        len(manifest.splits[TRAIN].parts) - 1
    )
    assert {step.stage for step in steps} == {"tokenizer", "corpus"}
    assert (steps[-1].documents, steps[-1].total_documents) == (600, 600)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("size", "cpus", "readers"),
    [
        (4000, 4, 3),
        pytest.param(500, 4, 3, marks=pytest.mark.slow),
        pytest.param(1000, 1, 1, marks=pytest.mark.slow),
        pytest.param(10_000, 2, 2, marks=pytest.mark.slow),
    ],
)
def test_the_bytes_do_not_depend_on_how_the_work_is_divided(
    built, tmp_path, monkeypatch, size, cpus, readers
):
    from ray.data import DataContext, ExecutionResources

    config, folder, manifest, _, _ = built
    small_blocks(monkeypatch, size)
    monkeypatch.setattr(tokenize_job, "_TOKENIZERS_PER_READER", 4 / readers)
    options = DataContext.get_current().execution_options
    monkeypatch.setattr(options, "resource_limits", ExecutionResources.for_limits(cpu=cpus))
    other = Folder(tmp_path / "corpus")
    again = build(config, other)
    assert part_bytes(other) == part_bytes(folder)
    assert again.splits == manifest.splits
    assert again.info["unigram_loss"] == manifest.info["unigram_loss"]


@pytest.mark.ray
def test_an_existing_corpus_is_reused_and_a_changed_one_is_refused(built, monkeypatch):
    config, folder, manifest, _, _ = built
    monkeypatch.setattr(build_module, "tokenized_blocks", None)  # would raise if it were called
    assert build(config, folder) == manifest
    assert existing(config, folder) == manifest
    changed = config.model_copy(update={"seq_len": 64})
    with pytest.raises(
        UserError, match=r"made with corpus.seq_len=32, now it is 64; name another folder, or pass"
    ):
        build(changed, folder)
    source = config.source.model_copy(update={"limit": 5})
    changed = config.model_copy(update={"source": source, "seed": 4})
    with pytest.raises(UserError, match=r"corpus.source.limit=None, now it is 5 \(and 1 more key"):
        build(changed, folder)


@pytest.mark.ray
def test_a_changed_source_file_is_refused_unless_forced(ray_session, tmp_path):
    path = write_lines(tmp_path / "a.txt", reviews(80))
    config, folder = settings_for(path), Folder(tmp_path / "corpus")
    build(config, folder)
    write_lines(path, reviews(90, seed=1))
    with pytest.raises(UserError, match=r"was made from .*a.txt of [\d,]+ bytes from .*--force"):
        build(config, folder)
    folder.write_bytes("train-00077.parquet", b"left by an earlier build")
    folder.write_bytes("notes.txt", b"not ours")
    manifest = build(config, folder, force=True)
    assert manifest.info["documents_read"] == 90
    expected = {"attempts", "manifest.json", "notes.txt"}
    expected |= {"tokenizer.json", "tokenizer_config.json"}
    expected |= {part.name for split in manifest.splits.values() for part in split.parts}
    assert set(folder.names()) == expected


@pytest.mark.ray
def test_a_failed_build_leaves_no_corpus(ray_session, tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in reviews(100)]
    path.write_text("\n".join([*lines[:60], "{broken", *lines[60:]]))
    folder = Folder(tmp_path / "corpus")
    build(settings_for(path, source={"on_bad_row": "skip"}), folder)
    tokenizer = {"kind": "file", "path": folder.path}
    other = Folder(tmp_path / "other")
    with pytest.raises(DataError, match=r"a.jsonl: line 61: not JSON; fix the row, or set on_bad"):
        build(settings_for(path, tokenizer=tokenizer), other)
    assert existing(settings_for(path), other) is None
    manifest = build(settings_for(path, tokenizer=tokenizer, source={"on_bad_row": "skip"}), other)
    assert manifest.info["skipped"] == {"not JSON": 1}
    assert manifest.tokenizer_hash == Manifest.read(folder).tokenizer_hash
    path.rename(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet is no Parquet file"):
        build(settings_for(tmp_path / "a.parquet", tokenizer=tokenizer), Folder(tmp_path / "third"))


@pytest.mark.ray
def test_duplicates_overlap_and_held_out_copies(ray_session, tmp_path, monkeypatch):
    small_blocks(monkeypatch, 5000)
    texts = reviews(120)
    doubled = [*texts, *(text.replace(" ", "  ") for text in texts[::-1]), *texts[:30]]
    path = write_lines(tmp_path / "a.txt", doubled)
    test_set = write_lines(tmp_path / "test.txt", [*texts[100:], "never seen before"])
    overlap = {"path": str(test_set)}
    dropped = Folder(tmp_path / "dropped")
    manifest = build(settings_for(path, overlap=overlap, overlap_drop=True), dropped)
    assert manifest.info["duplicates"] == 150
    assert manifest.info["overlap"] == 20
    assert sum(manifest.info["documents"].values()) == 100
    kept = Folder(tmp_path / "kept")
    manifest = build(
        settings_for(path, overlap=overlap, duplicates="keep", heldout_max_documents=4), kept
    )
    assert manifest.info["duplicates"] == 150
    assert manifest.info["overlap"] == 40
    assert sum(manifest.info["documents"].values()) == 270
    train, heldout = (set(documents_of(kept, manifest, split)) for split in (TRAIN, HELDOUT))
    assert len(heldout) == 4
    assert not train & heldout


@pytest.mark.ray
def test_a_limit_counts_good_documents(ray_session, tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": t} if n % 3 else {"text": " "} for n, t in enumerate(reviews(300))]
    path.write_text("\n".join(map(json.dumps, rows)))
    source = {"limit": 100, "on_bad_row": "skip"}
    manifest = build(settings_for(path, source=source), Folder(tmp_path / "corpus"))
    assert manifest.info["documents_read"] == 100
    assert manifest.info["skipped"] == {"empty": 100}  # a sample is taken of all rows


@pytest.mark.ray
def test_sources_and_settings_without_a_corpus_are_errors(ray_session, tmp_path):
    from tokenizers import Tokenizer as HfTokenizer
    from tokenizers import models, pre_tokenizers

    path = write_lines(tmp_path / "a.txt", reviews(12))
    folder = Folder(tmp_path / "corpus")
    with pytest.raises(DataError, match=r"no document is left for the heldout split of 12; raise"):
        build(settings_for(path, heldout_fraction=1e-9), folder)
    assert existing(settings_for(path), folder) is None
    with pytest.raises(UserError, match=r"rows_per_part=10 is not a multiple .*=4; use 8"):
        build(settings_for(path, rows_per_part=10, rows_per_group=4), folder)
    with pytest.raises(DataError, match="empty.txt: no documents"):
        build(settings_for(write_lines(tmp_path / "empty.txt", ["", " "])), folder)
    vocab = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2}
    hf = HfTokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    hf.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    Tokenizer(hf.to_str()).save(Folder(tmp_path / "bare"))
    with pytest.raises(UserError, match="the tokenizer sets no tokens before and after a text"):
        tokenizer = {"kind": "file", "path": str(tmp_path / "bare")}
        build(settings_for(path, tokenizer=tokenizer), folder)


@pytest.mark.ray
def test_word_starts_of_a_byte_level_tokenizer_are_stored(ray_session, tmp_path):
    from test_tokenizer import byte_level

    tokenizer = byte_level()
    tokenizer.save(Folder(tmp_path / "tokenizer"))
    path = write_lines(tmp_path / "a.txt", reviews(60))
    config = settings_for(path, tokenizer={"kind": "file", "path": str(tmp_path / "tokenizer")})
    folder = Folder(tmp_path / "corpus")
    manifest = build(config, folder)
    ragged = tokenizer.encode(reviews(60))
    rows = [rows_of(folder, manifest, split) for split in (TRAIN, HELDOUT)]
    written = sum(int(r.word_starts[r.input_ids != tokenizer.pad_id].sum()) for r in rows)
    assert written == int(ragged.word_starts.sum()) < len(ragged.values)


@pytest.mark.ray
def test_text_of_a_script_without_spaces_is_learned_and_unknown_text_refused(ray_session, tmp_path):
    draw = random.Random(0)
    lines = ["".join(chr(0x4E00 + draw.randrange(300)) for _ in range(60)) for _ in range(90)]
    path, folder = write_lines(tmp_path / "han.txt", lines), Folder(tmp_path / "corpus")
    with pytest.raises(
        DataError, match=r"100.0% of .*han.txt is unknown .*kind=byte_bpe \(now wor"
    ):
        build(settings_for(path, tokenizer={"kind": "words", "vocab_size": 290}), folder)
    assert not folder.exists()  # the tokenizer is measured before anything is written
    manifest = build(settings_for(path, tokenizer={"vocab_size": 400}), folder)
    assert (manifest.info["tokenizer_kind"], manifest.info["unknown"]) == ("byte_bpe", 0.0)
    for kind in ("auto", "byte_bpe"):  # the kind that was chosen is the same by its name
        assert existing(settings_for(path, tokenizer={"vocab_size": 400, "kind": kind}), folder)
    with pytest.raises(UserError, match=r"tokenizer.kind='auto', now it is 'wordpiece'"):
        existing(settings_for(path, tokenizer={"vocab_size": 400, "kind": "wordpiece"}), folder)
    # A given tokenizer is measured while it reads: this one knows English only.
    english = build(
        settings_for(write_lines(tmp_path / "a.txt", reviews(60))), Folder(tmp_path / "english")
    )
    assert english.info["unknown"] == 0.0
    tokenizer = {"kind": "file", "path": str(tmp_path / "english")}
    with pytest.raises(DataError, match="100.0% of .*han.txt is unknown"):
        build(settings_for(path, tokenizer=tokenizer), Folder(tmp_path / "other"))
    assert not Folder(tmp_path / "other").exists("manifest.json")


def test_a_corpus_of_before_a_setting_existed_is_that_of_its_default(tmp_path):
    """And one of the kind that was the default, of the kind that chooses it."""
    from making import make_corpus

    config = settings_for(write_lines(tmp_path / "a.txt", reviews(30)))
    folder = Folder(tmp_path / "corpus")
    make_corpus(folder, config=config)
    values = folder.read_json("manifest.json")
    values["info"]["config"]["tokenizer"]["kind"] = "wordpiece"
    del values["info"]["config"]["tokenizer"]["special_tokens_in_text"]
    del values["info"]["config"]["overlap_drop"]
    folder.write_json("manifest.json", values)
    assert existing(config, folder) is not None
    words = config.tokenizer.model_copy(update={"kind": "words"})
    with pytest.raises(UserError, match="tokenizer.kind='wordpiece', now it is 'words'"):
        existing(config.model_copy(update={"tokenizer": words}), folder)


def test_the_default_configuration_is_valid():
    config = CorpusConfig()
    assert config.rows_per_part % config.rows_per_group == 0
    assert config.tokenizer == TokenizerConfig()
    assert config.source == SourceConfig()
