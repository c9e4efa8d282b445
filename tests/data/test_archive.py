"""Tar archives, and IMDB's data set as an archive and as a folder."""

import io
import os
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import labelled
from source_files import imdb_files, texts_of, write_tar

from raybert.data.sources import archive
from raybert.data.sources.documents import documents, shards
from raybert.data.sources.opening import read_document
from raybert.data.sources.settings import SourceConfig
from raybert.errors import DataError

IMDB = Path(
    os.environ.get("RAYBERT_IMDB", Path(__file__).parents[3] / "shared/data/aclImdb_v1.tar.gz")
)


needs_imdb = pytest.mark.skipif(
    not IMDB.exists(), reason="aclImdb_v1.tar.gz is not here; set RAYBERT_IMDB to its path"
)


def test_imdb_archive_and_folder_yield_the_same_documents(tmp_path):
    path = write_tar(tmp_path / "imdb.tar.gz", imdb_files())
    with tarfile.open(path) as tar:
        # Python 3.11 has filters since 3.11.4.
        tar.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    for source in (path, tmp_path / "aclImdb", tmp_path):
        if source == tmp_path:
            path.unlink()
        found = labelled(SourceConfig(path=str(source), split="test"))
        assert dict(zip(found.texts.to_pylist(), found.labels.tolist(), strict=True)) == {
            f"test {label} {n}  end": index
            for index, label in enumerate(("neg", "pos"))
            for n in range(3)
        }
        corpus = texts_of(SourceConfig(path=str(source)))
        assert len(corpus) == 7 and "nobody rated this" in corpus
        assert len(texts_of(SourceConfig(path=str(source)), labels=True)) == 6
    with pytest.raises(DataError, match="no split 'dev'; there are train, unsup, test"):
        shards(SourceConfig(path=str(tmp_path), split="dev"))
    with pytest.raises(DataError, match=r"0_0.txt: no label; fix the row"):
        labelled(SourceConfig(path=str(tmp_path / "aclImdb"), split="unsup"))


@needs_imdb
def test_the_official_archive_has_the_official_counts():
    counts = Counter()
    for table in documents(SourceConfig(path=str(IMDB), split=["train", "test", "unsup"])):
        counts["rows"] += table.num_rows
    assert counts["rows"] == 100_000
    test = labelled(SourceConfig(path=str(IMDB), split="test"))
    assert (len(test.texts), int(test.labels.sum()), test.names) == (25_000, 12_500, ["neg", "pos"])


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_members_equal_those_of_tarfile(form):
    long = "d" * 90 + "/" + "e" * 60 + "/name.txt"
    content = {"a.txt": b"", "b/ü.txt": b"x" * 512, long: b"y" * 1025, "z": bytes(2_000_000)}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        folder = tarfile.TarInfo("b")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = archive.members(io.BytesIO(out.getvalue()), "it")
    assert {m.path: read_document(m.stream, "it") for m in found} == content


@given(cut_at=st.integers(0, 8000))
@settings(max_examples=60, deadline=None)
def test_a_truncated_tar_always_raises(cut_at):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(4):
            info = tarfile.TarInfo(f"{number}.txt")
            info.size = 1000
            tar.addfile(info, io.BytesIO(bytes([65 + number]) * 1000))
    whole = out.getvalue()
    end = 4 * 1536 + 512  # the first block of the end-of-archive mark
    read_members = archive.members(io.BytesIO(whole[:cut_at]), "it.tar")
    if cut_at < end:
        with pytest.raises(DataError, match="^it.tar is truncated or damaged"):
            list(read_members)
    else:
        assert len(list(read_members)) == 4
