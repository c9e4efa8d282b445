"""Parts: any row can be read back, by PartReader and by any Parquet reader."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raybert.data.corpus.manifest import Manifest, PartFile
from raybert.data.corpus.parts import PartReader, PartWriter
from raybert.errors import ConfigError, DamagedError, DataError
from raybert.storage.folder import Folder


def write(
    folder: Path | Folder, n: int, t: int = 24, vocab: int = 30_000
) -> tuple[Manifest, np.ndarray]:
    rng = np.random.default_rng(n)
    ids, starts = rng.integers(0, vocab, (n, t)), rng.random((n, t)) < 0.5
    folder = folder if isinstance(folder, Folder) else Folder(folder)
    writer = PartWriter(
        folder, "train", seq_len=t, vocab_size=vocab, rows_per_part=64, rows_per_group=16
    )
    for begin in range(0, n, 37):
        writer.append(ids[begin : begin + 37], starts[begin : begin + 37])
    manifest = Manifest(
        format_version=1,
        seq_len=t,
        dtype="uint16" if vocab <= 65536 else "uint32",
        vocab_size=vocab,
        tokenizer_hash="",
        splits={"train": writer.close()},
    )
    return manifest, np.stack([ids, starts])


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 400), vocab=st.sampled_from([300, 70_000]), data=st.data())
def test_rows_are_read_in_the_order_of_their_ids(
    tmp_path_factory: pytest.TempPathFactory, n: int, vocab: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    manifest, written = write(folder, n, vocab=vocab)
    reader = PartReader(Folder(folder), manifest, "train")
    reader.check()
    asked = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    rows = reader.read_rows(asked)
    assert (rows.input_ids == written[0][asked]).all()
    assert (rows.word_starts == written[1][asked].astype(bool)).all()
    assert manifest.splits["train"].rows == n


def test_the_parts_of_an_object_store_are_read_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PartReader, "_OPEN_FILES", 2)
    folder = Folder("mock:///corpus")  # in memory, but not a local path
    folder.filesystem.create_dir(folder.path)
    manifest, written = write(folder, 1000)
    reader = PartReader(folder, manifest, "train")
    reader.check()
    for seed in range(5):
        asked = np.random.default_rng(seed).permutation(1000)
        rows = reader.read_rows(asked)
        assert (rows.input_ids == written[0][asked]).all()
        assert (rows.word_starts == written[1][asked].astype(bool)).all()
    assert len(reader._files) <= 2


def grow(folder: Path, manifest: Manifest, parts: int, groups: int) -> Manifest:
    """Replace a corpus's only part by sparse parts of `groups` row groups each."""
    split = manifest.splits["train"]
    [small] = split.parts
    whole = small.rows // split.rows_per_group
    size = small.bytes + (groups - whole) * split.layout.stride
    rows = groups * split.rows_per_group
    names = [f"train-{index:05d}.parquet" for index in range(parts)]
    large = [PartFile(name=name, rows=rows, bytes=size, sha256="0" * 64) for name in names]
    for name in names:
        with (folder / name).open("wb") as file:
            file.truncate(size)
    grown = {"rows": rows * parts, "rows_per_part": rows, "parts": large}
    splits = {"train": split.model_copy(update=grown)}
    return manifest.model_copy(update={"splits": splits})


def test_rows_beyond_two_to_the_33rd_are_read_from_the_right_place(tmp_path: Path) -> None:
    """The parts are sparse files of 23 GB: only the row groups that are read have content."""
    manifest, written = write(tmp_path, 64, t=8)  # four row groups
    data = (tmp_path / "train-00000.parquet").read_bytes()
    manifest = grow(tmp_path, manifest, parts=9, groups=1 << 26)
    split = manifest.splits["train"]
    first, stride = split.layout.first, split.layout.stride
    assert split.rows > 1 << 33
    per_part = 1 << 26
    placed = [(8, per_part - 1), (8, 0), (7, 12_345_678), (0, 3)]  # (part, row group in it)
    asked = []
    for source, (part, group) in enumerate(placed):
        with (tmp_path / split.parts[part].name).open("r+b") as file:
            file.seek(first + group * stride)
            file.write(data[first + source * stride :][:stride])
        asked += [(part * per_part + group) * 16 + row for row in range(16)]
    reader = PartReader(Folder(tmp_path), manifest, "train")
    reader.check()
    mixed = np.random.default_rng(0).permutation(64)
    rows = reader.read_rows(np.array(asked)[mixed])
    assert (rows.input_ids == written[0][mixed]).all()
    assert (rows.word_starts == written[1][mixed].astype(bool)).all()
    with pytest.raises(IndexError):
        reader.read_rows(np.array([split.rows]))


def test_a_pickled_reader_of_many_parts_is_small(tmp_path: Path) -> None:
    manifest, _ = write(tmp_path, 64)
    manifest = grow(tmp_path, manifest, parts=1000, groups=8)
    packed = pickle.dumps(PartReader(Folder(tmp_path), manifest, "train"))
    assert len(packed) < 40 * 1000
    pickle.loads(packed).check()


def test_parts_are_ordinary_parquet(tmp_path: Path) -> None:
    _, written = write(tmp_path, 100)
    table = pq.read_table(tmp_path / "train-00001.parquet")
    assert len(table) == 36
    first = np.frombuffer(table["input_ids"][0].as_py(), np.uint16)
    assert (first == written[0][64]).all()


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_damaged_part_is_named(tmp_path: Path, harm: str) -> None:
    manifest, _ = write(tmp_path, 100)
    part = tmp_path / "train-00001.parquet"
    part.write_bytes(part.read_bytes()[:-200]) if harm == "cut" else part.unlink()
    reader = PartReader(Folder(tmp_path), manifest, "train")
    with pytest.raises(DamagedError, match=r"train-00001.parquet (has|is missing)"):
        reader.check()


def test_a_manifest_that_is_missing_newer_or_cut(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    with pytest.raises(DataError, match="no corpus here"):
        Manifest.read(folder)
    folder.write_json("manifest.json", {"format_version": 99})
    with pytest.raises(DataError, match="format 99, this raybert reads up to 1"):
        Manifest.read(folder)
    folder.write_text("manifest.json", '{"format_ver')
    with pytest.raises(DamagedError, match="manifest.json is damaged"):
        Manifest.read(folder)


def test_rows_per_part_must_be_a_multiple_of_rows_per_group(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rows_per_part=100 is not a multiple of .*; use 96"):
        PartWriter(
            Folder(tmp_path), "t", seq_len=8, vocab_size=9, rows_per_part=100, rows_per_group=32
        )
