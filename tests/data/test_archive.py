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
@pytest.mark.slow
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


def hostile(kind):
    """A tar archive with one header that is wrong, though its checksum is right."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.txt")
        info.size, info.pax_headers = 4, {"comment": "c" * 5000}
        tar.addfile(info, io.BytesIO(b"text"))
    data = bytearray(out.getvalue())
    at = 0
    if kind == "negative size":
        at = (
            len(data)
            - len(data) % 512
            - next(n for n in range(512, len(data), 512) if data[-n:][257:262] == b"ustar")
        )
        data[at + 124 : at + 136] = b"-1000\0      "
    elif kind == "huge header":
        data[124:136] = b"77777777777\0"
    else:
        record = {"zero length": b"0 path=a\n", "digits": b"1" * 5000}[kind]
        data[512 : 512 + len(record)] = record
    checksum = sum(data[at : at + 148]) + sum(data[at + 156 : at + 512]) + 8 * 32
    data[at + 148 : at + 156] = b"%06o\0 " % checksum
    return bytes(data)


@pytest.mark.parametrize("kind", ["zero length", "negative size", "huge header", "digits"])
def test_hostile_headers_are_an_error_in_a_line(tmp_path, kind):
    (tmp_path / "a.tar").write_bytes(hostile(kind))
    with pytest.raises(
        DataError, match=r"^\S*a.tar is truncated or damaged \(a member's header .*\)"
    ):
        texts_of(SourceConfig(path=str(tmp_path / "a.tar")))
