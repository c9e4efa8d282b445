"""Builds of a corpus in one folder: which one finishes, and damaged parts."""

import numpy as np
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from making import make_corpus

from raybert.data.corpus.attempts import Attempt
from raybert.data.corpus.corpus_writer import CorpusWriter
from raybert.data.corpus.manifest import FORMAT_VERSION, Manifest
from raybert.data.corpus.parts import PartReader
from raybert.data.corpus.settings import CorpusConfig
from raybert.data.corpus.tokenize_job import tokenize
from raybert.data.corpus.verification import verify_parts
from raybert.data.sources.files import Row
from raybert.data.sources.row_table import RowTable
from raybert.data.tokenizer import Tokenizer
from raybert.data.tokenizer_training import TokenizerConfig, make_tokenizer
from raybert.errors import DamagedError, Superseded
from raybert.storage.folder import Folder


class Build:
    """A build of 40 documents in this process, which stops where a test says."""

    def __init__(self, folder, seed):
        self.folder = folder
        draw = np.random.default_rng(seed)
        self.texts = [" ".join(draw.choice(list("abcdefgh"), 20)) + f" {i}" for i in range(40)]
        self.tokenizer = make_tokenizer(TokenizerConfig(kind="words", min_frequency=1), self.texts)
        self.config = CorpusConfig(
            seq_len=8, rows_per_part=4, rows_per_group=2, heldout_fraction=0.3
        )
        self.attempt = Attempt(folder)
        self.attempt.delete_leftovers()
        self.writer = CorpusWriter(self.config, folder, self.tokenizer, None, self.attempt)
        self.left = list(self.texts)

    def write(self, count):
        some, self.left = self.left[:count], self.left[count:]
        table = RowTable(self.config.source, None)
        for text in some:
            table.add(Row(text, None), "a")
        key = self.tokenizer.hash
        from raybert.data.corpus import tokenize_job

        tokenize_job._tokenizers[key] = self.tokenizer
        self.writer.add(tokenize(table.flush(), None, key, 0))

    def commit(self):
        self.write(len(self.left))
        splits, info = self.writer.close()
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            seq_len=8,
            dtype="uint16",
            vocab_size=self.tokenizer.vocab_size,
            tokenizer_hash=self.tokenizer.hash,
            splits=splits,
            info=info,
        )
        self.attempt.commit(self.tokenizer, manifest)
        return manifest


def check(folder, manifest):
    """The corpus in the folder is the one that a manifest describes, and nothing else."""
    assert Manifest.read(folder) == manifest
    verify_parts(folder, manifest, lambda done, of: None)
    assert Tokenizer.load(folder).hash == manifest.tokenizer_hash
    expected = {"attempts", "manifest.json", "tokenizer.json", "tokenizer_config.json"}
    expected |= {part.name for split in manifest.splits.values() for part in split.parts}
    assert set(folder.names(hidden=True)) == expected


@given(first=st.integers(0, 39), second=st.integers(0, 39), more=st.integers(0, 39))
@settings(max_examples=examples(10), deadline=None)
def test_of_two_builds_the_later_one_finishes_however_they_take_turns(
    tmp_path_factory, first, second, more
):
    folder = Folder(tmp_path_factory.mktemp("corpus"))
    one = Build(folder, 1)
    one.write(first)
    two = Build(folder, 2)
    two.write(second)
    try:
        one.write(min(more, len(one.left)))
    except Superseded as error:
        assert "build 2 of this corpus has taken over; build 1 ends here" in str(error)
    manifest = two.commit()
    with pytest.raises(Superseded):
        one.commit()
    check(folder, manifest)


def test_a_corpus_stays_until_another_one_replaces_it(tmp_path):
    folder = Folder(tmp_path)
    (tmp_path / "notes.txt").write_text("not ours")
    before = Build(folder, 1).commit()
    (tmp_path / "notes.txt").unlink()
    assert [part.name for part in before.splits["heldout"].parts][0] == "heldout-00000.parquet"
    for stop in (0, 25):  # is killed
        Build(folder, 2).write(stop)
        verify_parts(folder, before, lambda done, of: None)
    again = Build(folder, 1).commit()
    check(folder, again)
    assert again.splits["train"].parts[0].name == "train-00000-a0004.parquet"
    assert again.digest == before.digest  # the same content by another build
    assert Build(folder, 3).commit().digest != before.digest


def test_a_corpus_of_before_there_were_attempts_is_replaced_as_others(tmp_path):
    folder = Folder(tmp_path)
    before = make_corpus(folder)
    (tmp_path / "train-00099.parquet").write_bytes(b"left by an unfinished build")
    (tmp_path / ".train-00001.parquet.0a1b2c3d").write_bytes(b"")
    (tmp_path / "train-x.parquet").write_bytes(b"not ours")
    build = Build(folder, 1)
    verify_parts(folder, before, lambda done, of: None)
    assert not folder.exists("train-00099.parquet")
    manifest = build.commit()
    (tmp_path / "train-x.parquet").unlink()
    check(folder, manifest)


@pytest.mark.parametrize("content", ["[]", "{", '{"format_version": 99}'])
def test_a_corpus_with_a_damaged_manifest_is_replaced(tmp_path, content):
    folder = Folder(tmp_path)
    Build(folder, 1).commit()
    (tmp_path / "manifest.json").write_text(content)
    check(folder, Build(folder, 2).commit())


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_damaged_part_is_named_before_a_run_reads_it(tmp_path_factory, data):
    base = tmp_path_factory.mktemp("corpus")
    folder = Folder(base)
    manifest = make_corpus(folder)
    seen = []
    verify_parts(folder, manifest, lambda done, of: seen.append((done, of)))
    names = [part.name for split in manifest.splits.values() for part in split.parts]
    assert seen == [(n, len(names)) for n in range(1, len(names) + 1)]
    path = base / data.draw(st.sampled_from(names))
    content = bytearray(path.read_bytes())
    begin = data.draw(st.integers(0, len(content) - 64))
    for at in range(begin, begin + data.draw(st.integers(1, 64))):
        content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=rf"{path.name} is damaged: its SHA-256.*corpus --force"):
        verify_parts(folder, manifest, lambda done, of: None)


def test_ids_of_no_token_are_refused_also_where_the_checksum_fits(tmp_path):
    folder = Folder(tmp_path)
    manifest = make_corpus(folder).model_copy(update={"vocab_size": 20})
    with pytest.raises(DamagedError, match=r"parquet has the id \d+, and the vocabulary 20 tokens"):
        verify_parts(folder, manifest, lambda done, of: None)
    reader = PartReader(folder, manifest, "train")
    with pytest.raises(DamagedError, match="and the vocabulary has 20 tokens; make the corpus"):
        reader.read_rows(np.arange(reader.rows))
