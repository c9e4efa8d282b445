"""Formats, compressions and layouts of files: what is read, and what is counted as left out."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from making import labelled
from source_files import LABELS, TEXTS, csv_bytes, texts_of, write, write_parquet, write_tar

from raybert.data.sources.documents import column_names, describe, shards
from raybert.data.sources.settings import EvaluationSource, SourceConfig
from raybert.errors import DataError

ROWS = list(zip(TEXTS, LABELS, strict=True))
PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
    ".lz4": None,  # Arrow writes frames to files only
    "": lambda data: data,
}


def pairs(path, **options):
    found = labelled(SourceConfig(path=str(path), **options))
    return list(zip(found.texts.to_pylist(), [found.names[i] for i in found.labels], strict=True))


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("suffix", [*PACKERS, ".GZ"])
def test_the_content_says_how_a_file_is_compressed(tmp_path, packer, suffix):
    path = tmp_path / f"a.csv{suffix}"
    data = csv_bytes(ROWS)
    if packer == ".lz4":
        with pa.OSFile(str(path), "wb") as file, pa.CompressedOutputStream(file, "lz4") as stream:
            stream.write(data)
    else:
        path.write_bytes(PACKERS[packer](data))
    assert pairs(path) == ROWS


@pytest.mark.parametrize("packer", [".gz", ".bz2", ".xz", ".zst"])
def test_several_compressed_streams_in_a_file_are_one_text(tmp_path, packer):
    pack = PACKERS[packer]
    path = write(tmp_path / f"a.{packer}.txt", pack(b"one\n" * 9) + pack(b"two\n"))
    assert texts_of(SourceConfig(path=str(path))) == ["one"] * 9 + ["two"]
    path.write_bytes(pack(b"one\n" * 9)[:-6])
    with pytest.raises(DataError, match="truncated or damaged"):
        texts_of(SourceConfig(path=str(path)))


def json_forms():
    records = [{"text": text, "label": label} for text, label in ROWS]
    yield "lines", "".join(json.dumps(record) + "\n" for record in records)
    yield "array", json.dumps(records)
    yield "indented array", json.dumps(records, indent=2)
    yield "indented objects", "\n".join(json.dumps(record, indent=2) for record in records)
    yield "one object a line in an array", "[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n"
    yield "in a field", json.dumps({"version": "1", "data": records})
    yield "in a field, indented", json.dumps({"version": "1", "data": records}, indent=1)
    texts, labels = ({str(n): row[i] for n, row in enumerate(ROWS)} for i in (0, 1))
    yield "pandas", json.dumps({"text": texts, "label": labels})
    lists = {"text": list(texts.values()), "label": list(labels.values())}
    yield "pandas, lists", json.dumps(lists)
    yield "lists, indented", json.dumps(lists, indent=1)
    split = {"columns": ["text", "label"], "index": [*range(len(ROWS))], "data": ROWS}
    yield "pandas, split", json.dumps(split)
    yield "pandas, index", json.dumps({str(n): record for n, record in enumerate(records)})
    yield "beside other rows", json.dumps({"features": [{"name": "text"}], "rows": records})


@pytest.mark.parametrize(("form", "text"), list(json_forms()))
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "part-0003"])
def test_every_form_of_json_yields_the_same_rows(tmp_path, form, text, name):
    path = write(tmp_path / name, text.encode())
    assert pairs(path) == ROWS
    assert set(column_names(SourceConfig(path=str(path)))) == {"text", "label"}


def test_the_words_of_a_text_in_a_line_are_no_column(tmp_path):
    row = json.dumps({"text": ["a", "film"], "label": ["O", "O"]}) + "\n"
    path = write(tmp_path / "a.jsonl", (row * 2).encode())
    assert texts_of(SourceConfig(path=str(path))) == ["a film"] * 2


@pytest.mark.parametrize("suffix", [".xlsx", ".ods", ".pdf", ".orc", ".7z"])
def test_a_format_of_another_program_is_named_with_a_remedy(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", b"PK")
    with pytest.raises(DataError, match="is a format that is not read here; (save|write|unpack)"):
        texts_of(SourceConfig(path=str(path)))


def test_json_that_is_cut_or_malformed_names_the_row(tmp_path):
    path = write(tmp_path / "a.json", b'[{"text": "a"}, {"text": "b"}, {"text": ')
    with pytest.raises(
        DataError, match=r"a.json: row 3: not JSON \(Expecting value\); fix the file"
    ):
        texts_of(SourceConfig(path=str(path)))
    path = write(tmp_path / "a.json", b'[{"text": "a"} {"text": "b"}]')
    with pytest.raises(DataError, match=r"a.json: row 1: not JSON \(no comma follows it\)"):
        texts_of(SourceConfig(path=str(path)))
    path = write(tmp_path / "a.json", b'[{"text": "a"}, 5, ["b"], {"text": "c"}]')
    assert texts_of(SourceConfig(path=str(path), on_bad_row="skip")) == ["a", "c"]


def test_a_record_without_the_key_is_a_bad_row_wherever_it_is(tmp_path):
    rows = b'{"id": 1}\n{"text": "a", "label": "x"}\n{"text": "b"}\n{"text": "c", "label": "y"}\n'
    path = str(write(tmp_path / "a.jsonl", rows))
    assert pairs(path, on_bad_row="skip") == [("a", "x"), ("c", "y")]
    with pytest.raises(
        DataError,
        match=r"line 1: no text column \(no column 'text'; set text_column .--text-column. to",
    ):
        labelled(SourceConfig(path=path))
    with pytest.raises(
        DataError,
        match=r"no column 'body'; set text_column \(--text-column\) to one of: id, text, label",
    ):
        texts_of(SourceConfig(path=path, text_column="body", on_bad_row="skip"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_fields_of_nested_columns_have_dotted_names(tmp_path, kind):
    records = [{"review": {"body": [text], "meta": {"stars": y}}} for text, y in ROWS]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write(path, "".join(json.dumps(record) + "\n" for record in records).encode())
    else:
        pq.write_table(pa.Table.from_pylist(records), path)
    options = {"text_column": "review.body.0", "label_column": "review.meta.stars"}
    assert pairs(path, **options) == ROWS
    with pytest.raises(DataError, match=r"no label|no column 'rating.stars'"):
        pairs(path, **options | {"label_column": "rating.stars"})


def test_partitions_are_columns(tmp_path):
    for name, label in (("pos", "pos"), ("neg", "neg"), ("so%20so", "so so")):
        folder = tmp_path / f"label={name}"
        folder.mkdir()
        write_parquet(folder / "part-0.parquet", {"text": [f"{label} a", f"{label} b"]})
        write(folder / "_SUCCESS", b"")
    expected = [(f"{y} {n}", y) for y in ("neg", "pos", "so so") for n in "ab"]
    assert pairs(tmp_path) == expected
    assert pairs(f"{tmp_path}/label=*/*.parquet") == expected
    null = tmp_path / "label=__HIVE_DEFAULT_PARTITION__"
    null.mkdir()
    write_parquet(null / "part-0.parquet", {"text": ["unknown"]})
    assert pairs(tmp_path, on_bad_row="skip") == expected


@pytest.mark.parametrize("suffix", [".txt", "", ".txt.gz"])
def test_a_folder_for_each_class_labels_its_texts(tmp_path, suffix):
    for label in ("sci.space", "rec.autos"):
        for number in range(3):
            write(tmp_path / label / f"{number}{suffix}", f"{label}\n\nnumber {number}".encode())
    expected = [(f"{y}\n\nnumber {n}", y) for y in ("rec.autos", "sci.space") for n in range(3)]
    assert pairs(tmp_path) == expected
    assert pairs(f"{tmp_path}/*/*") == expected
    (line,) = describe(SourceConfig(path=str(tmp_path)), labels=True)
    assert line.endswith("6 text files; labels are the names of 2 folders, a document a file")
    lines = pairs(tmp_path, format="text")
    assert lines[:2] == [("rec.autos", "rec.autos"), ("number 0", "rec.autos")]
    assert len(texts_of(SourceConfig(path=str(tmp_path)))) == 12  # a corpus reads lines as before


def test_the_folders_of_classes_may_be_in_another_one_or_in_an_archive(tmp_path):
    members = [
        (f"reviews/{label}/{number}.txt", f"{label}\n{number}".encode())
        for label in ("neg", "pos")
        for number in range(2)
    ]
    expected = [(f"{label}\n{number}", label) for label in ("neg", "pos") for number in range(2)]
    for name, data in members:
        write(tmp_path / "all" / name, data)
    assert pairs(tmp_path / "all") == expected
    assert pairs(zip_of(tmp_path / "a.zip", members)) == expected
    assert pairs(write_tar(tmp_path / "a.tar.gz", members)) == expected


def test_a_class_with_one_file_has_a_document_a_line(tmp_path):
    for label in ("neg", "pos"):
        write(tmp_path / label / "all.txt", f"{label} 1\n{label} 2\n".encode())
    assert pairs(tmp_path) == [
        ("neg 1", "neg"),
        ("neg 2", "neg"),
        ("pos 1", "pos"),
        ("pos 2", "pos"),
    ]
    for split in ("train", "test"):
        write(tmp_path / "s" / split / "x" / "a.txt", b"text")
    with pytest.raises(DataError, match=r"s: its folders are splits \(test, train\), not classes"):
        pairs(tmp_path / "s")


def zip_of(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def test_archives_are_read_as_their_folder_would_be(tmp_path):
    parquet = io.BytesIO()
    pq.write_table(pa.table({"text": ["p"], "label": ["neg"]}), parquet)
    members = [
        ("d/a.csv", csv_bytes(ROWS)),
        ("d/b.jsonl.gz", gzip.compress(b'{"text": "zipped", "label": "pos"}\n')),
        ("d/README.md", b"about"),
        ("__MACOSX/d/._a.csv", b"\0"),
    ]
    expected = [*ROWS, ("zipped", "pos")]
    zipped = zip_of(tmp_path / "a.zip", [*members, ("d/p.parquet", parquet.getvalue())])
    assert pairs(zipped) == [*expected, ("p", "neg")]
    (line,) = describe(SourceConfig(path=str(zipped)), labels=True)
    assert line.endswith(f"left out: .md files: {zipped}/d/README.md")
    assert pairs(write_tar(tmp_path / "a.tar.gz", members)) == expected
    assert len(pairs(f"{tmp_path}/a.*")) == 2 * len(expected) + 1
    with pytest.raises(DataError, match=r"a.tar.gz: d/a.csv: row 1: no label"):
        bad = [("d/a.csv", csv_bytes([("x", " ")]))]
        pairs(write_tar(tmp_path / "a.tar.gz", bad))


def test_zip_archives_that_can_not_be_read_are_named(tmp_path):
    path = zip_of(tmp_path / "a.zip", [("a.txt", b"text " * 99)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(DataError, match=r"a.zip is no zip archive, or is cut short: \S"):
        texts_of(SourceConfig(path=str(path)))
    damaged = bytearray(whole)
    damaged[40] ^= 0xFF
    path.write_bytes(bytes(damaged))
    with pytest.raises(DataError, match=r"a.zip/a.txt.*(damaged|can't be read)"):
        texts_of(SourceConfig(path=str(path)))
    encrypted = bytearray(whole)
    encrypted[6] |= 1
    encrypted[whole.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(bytes(encrypted))
    with pytest.raises(DataError, match=r"a.zip/a.txt: can't be read: .*encrypted"):
        texts_of(SourceConfig(path=str(path)))


def test_what_is_left_out_is_counted_and_named(tmp_path):
    for name in ("a.txt", "b.md", "c.md", "README", "d.pdf.gz"):
        write(tmp_path / name, b"about us\n")
    (line,) = describe(SourceConfig(path=str(tmp_path)))
    assert line == (
        f"{tmp_path}: 1 text file; left out: .md files: {tmp_path}/b.md and 1 more; "
        f".pdf files: {tmp_path}/d.pdf.gz; files without a suffix: {tmp_path}/README"
    )


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "text"])
def test_parts_without_a_suffix_are_read_as_the_files_beside_them(tmp_path, kind):
    for name in ("a", "part-0003"):
        path = tmp_path / (f"{name}.{'txt' if kind == 'text' else kind}" if name == "a" else name)
        if kind == "parquet":
            write_parquet(path, {"text": [name]})
        else:
            text = {"csv": "text,label\n{},x\n", "jsonl": '{{"text": "{}"}}\n', "text": "{}\n"}[
                kind
            ]
            write(path, text.format(name).encode())
    write(tmp_path / "LICENSE", b"Permission is granted, to all\n")
    assert texts_of(SourceConfig(path=str(tmp_path))) == ["a", "part-0003"]
    assert texts_of(SourceConfig(path=str(tmp_path / "part-0003"))) == ["part-0003"]
    assert "LICENSE" in describe(SourceConfig(path=str(tmp_path)))[0]


FEATURES = {
    "label": {"names": ["bad", "good"], "_type": "ClassLabel"},
    "tags": {"feature": {"names": ["O", "B-PER"], "_type": "ClassLabel"}, "_type": "Sequence"},
}


def hub_table(texts, labels):
    metadata = {b"huggingface": json.dumps({"info": {"features": FEATURES}}).encode()}
    columns = {"text": texts, "label": pa.array(labels), "tags": [[0, 1]] * len(texts)}
    return pa.table(columns).replace_schema_metadata(metadata)


def test_class_names_of_datasets_are_the_labels(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(hub_table(["a", "b", "c"], [1, 0, -1]), path)
    assert pairs(path, on_bad_row="skip") == [("a", "good"), ("b", "bad")]
    assert pairs(path, on_bad_row="skip", labels=["no", "yes"]) == [("a", "yes"), ("b", "no")]
    tags = SourceConfig(path=str(path), label_column="tags")
    from raybert.data.sources.documents import raw_rows

    assert raw_rows(tags, 1)[0].label == ["O", "B-PER"]


def save_to_disk(folder, table):
    """What `datasets.Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    name = "data-00000-of-00001.arrow"
    with pa.ipc.new_stream(folder / name, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    write(folder / "state.json", json.dumps({"_data_files": [{"filename": name}]}).encode())
    write(folder / "dataset_info.json", json.dumps({"features": FEATURES}).encode())


def test_folders_that_datasets_saved_are_read_by_split(tmp_path):
    save_to_disk(tmp_path / "one", hub_table(["a", "b", "c"], [1, 0, 1]))
    assert pairs(tmp_path / "one") == [("a", "good"), ("b", "bad"), ("c", "good")]
    for split in ("train", "test", "extra"):
        save_to_disk(tmp_path / "all" / split, hub_table([f"{split} 1", f"{split} 2"], [0, 1]))
    write(tmp_path / "all" / "dataset_dict.json", b'{"splits": ["train", "test", "extra"]}')
    assert [text for text, _ in pairs(tmp_path / "all")] == ["train 1", "train 2"]
    assert texts_of(EvaluationSource(path=str(tmp_path / "all"))) == ["test 1", "test 2"]
    assert pairs(tmp_path / "all", split="extra")[0] == ("extra 1", "bad")
    with pytest.raises(DataError, match="no split 'dev'; there are extra, test, train"):
        shards(SourceConfig(path=str(tmp_path / "all"), split="dev"))


def test_arrow_files_are_read_as_streams_are(tmp_path):
    table = pa.table({"text": TEXTS, "label": LABELS})
    for name, new in (("a.arrow", pa.ipc.new_stream), ("b.feather", pa.ipc.new_file)):
        with new(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
        assert pairs(tmp_path / name) == ROWS


def test_a_sparse_file_in_an_archive_is_refused(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.txt")
        info.size, info.pax_headers = 4, {"GNU.sparse.map": "0,4", "GNU.sparse.size": "4"}
        tar.addfile(info, io.BytesIO(b"text"))
    with pytest.raises(DataError, match="a.tar: a.txt is a sparse file; unpack the archive"):
        texts_of(SourceConfig(path=str(path)))
