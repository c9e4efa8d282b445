"""Tables: bad rows, delimiters, quoting, encodings and headers."""

import csv
import io
from collections import Counter

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from making import labelled
from source_files import texts_of, write

from raybert.config import build
from raybert.data.sources.csv_records import Dialect, records
from raybert.data.sources.documents import describe, documents
from raybert.data.sources.settings import SourceConfig
from raybert.errors import ConfigError, DataError

GOOD = [(f"a text, number {n}", ("neg", "pos")[n % 2]) for n in range(60)]


def table(rows, delimiter=",", header=("text", "label"), **options):
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, **options).writerows(
        [*([header] if header else []), *rows]
    )
    return out.getvalue()


def read(path, **options):
    """The texts, the labels and the bad rows by kind."""
    skipped = Counter()
    found = labelled(SourceConfig(path=str(path), on_bad_row="skip", **options))
    skipped.update(found.skipped)
    return found.texts.to_pylist(), [found.names[i] for i in found.labels.tolist()], skipped


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("I liked it, really,pos", "wrong number of fields"),
        ("too,many,fields,,", "wrong number of fields"),
        ("one", "wrong number of fields"),
        ('"good film,pos', "a quote is open"),
        ('a film","pos', "a quote is open"),
        ('"he said "no", twice",neg', "text follows a closing quote"),
        ('pos,"', "a quote is open"),
    ],
)
@pytest.mark.parametrize("at", [0, 30, 59])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_bad_line_is_one_bad_row_and_changes_no_other(tmp_path, line, kind, at, ending):
    rows = table(GOOD, lineterminator=ending).splitlines(keepends=True)
    path = write(
        tmp_path / "a.csv", "".join([*rows[: at + 1], line + ending, *rows[at + 1 :]]).encode()
    )
    texts, labels, skipped = read(path)
    assert list(zip(texts, labels, strict=True)) == GOOD
    assert sum(skipped.values()) == 1
    assert next(iter(skipped)).startswith(kind)
    with pytest.raises(
        DataError, match=rf"a.csv: row {at + 1}: {kind}.*; fix the row, or set on_bad"
    ):
        labelled(SourceConfig(path=str(path)))


def test_two_stray_quotes_do_not_join_the_rows_between_them(tmp_path):
    """Quotes that close where a field ends make a record of the right number of fields."""
    rows = table(GOOD).splitlines(keepends=True)
    for gap in (1, 2, 3, 20):
        begin = '"a film that,pos\r\n', *rows[11 : 11 + gap]
        text = "".join([*rows[:11], *begin, 'was long",neg\r\n', *rows[11 + gap :]])
        texts, labels, skipped = read(write(tmp_path / "a.csv", text.encode()))
        found = list(zip(texts, labels, strict=True))
        assert [row for row in found if row != ('was long"', "neg")] == GOOD
        assert sum(skipped.values()) == 1


def test_texts_of_many_lines_are_one_row(tmp_path):
    letter = "Dear all,\n\nplease read, and answer\n" + "one line, of text\n" * 300 + "bye"
    rows = [(letter, "pos"), ("short", "neg"), (letter[::-1], "pos")] * 5
    texts, _, skipped = read(write(tmp_path / "a.csv", table(rows).encode()))
    assert texts == [text.strip() for text, _ in rows]
    assert not skipped


@given(
    rows=st.lists(
        st.lists(st.text("ab,;|\t\"'\n\r é\\", max_size=8), min_size=3, max_size=3), max_size=8
    ),
    delimiter=st.sampled_from(",;\t|"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
@example(rows=[["", "", ""]], delimiter=",", quoting=csv.QUOTE_MINIMAL)
@settings(deadline=None)
def test_records_are_those_that_were_written(rows, delimiter, quoting):
    # Lines of the same values look like records that a quote has joined.
    assume(
        all("\n" not in cell and "\r" not in cell for row in rows for cell in row) or len(rows) < 2
    )
    text = table(rows, delimiter, header=("x", "y", "z"), quoting=quoting)
    found = list(records(io.StringIO(text, newline="").readline, Dialect(delimiter)))
    assert found == [["x", "y", "z"], *rows]


@given(lines=st.lists(st.text('ab,"\n', max_size=12), max_size=30), width=st.integers(1, 3))
@settings(deadline=None)
def test_every_line_is_part_of_a_record_or_a_bad_row(lines, width):
    text = "\n".join(lines)
    found = list(records(io.StringIO(text, newline="").readline, Dialect(","), width))
    assert all(isinstance(row, str) or len(row) == width for row in found)
    physical = [line for line in text.split("\n") if line.strip()]
    inside = sum(field.count("\n") for row in found if not isinstance(row, str) for field in row)
    assert len(found) <= len(physical) <= len(found) + inside


def test_a_quote_that_is_never_closed_takes_time_in_proportion_to_the_file():
    taken = 0
    text = io.StringIO('x,"open\n' + 'x,""a\n' * 50_000 + 'x,"open\n' * 3, newline="")

    def readline(size):
        nonlocal taken
        taken += 1
        return text.readline(size)

    assert sum(isinstance(row, str) for row in records(readline, Dialect(","), 2)) == 50_004
    assert taken < 60_000


ENCODINGS = {
    "utf-8": "naïve façade, großartig",
    "utf-8-sig": "naïve façade",
    "utf-16": "naïve façade – 映画",
    "utf-16-le": "naïve façade",
    "utf-32": "naïve façade",
    "latin-1": "naïve façade, große Überraschung, ¿qué?",
    "cp1252": "it’s “good” – naïve",
    "cp1251": "очень хороший фильм, смотрел два раза",
    "shift_jis": "とても良い映画でした。また見たいと思います",
    "gb18030": "这部电影非常好看，我很喜欢里面的故事",
    "euc-kr": "아주 좋은 영화입니다 다시 보고 싶어요",
}


@pytest.mark.parametrize("encoding", [e for e in ENCODINGS if e != "shift_jis"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_and_encodings_are_found(tmp_path, encoding, delimiter):
    rows = [(f"{ENCODINGS[encoding]} {n}", ("neg", "pos")[n % 2]) for n in range(8)]
    text = table(rows, delimiter)
    path = write(tmp_path / "a.csv", text.encode(encoding))
    texts, labels, skipped = read(path)
    assert list(zip(texts, labels, strict=True)) == rows and not skipped
    (line,) = describe(SourceConfig(path=str(path)), labels=True)
    assert line.startswith(f"{path}: 1 csv file (delimiter ")


def test_an_encoding_that_is_not_found_can_be_set(tmp_path):
    rows = [(ENCODINGS["shift_jis"], "pos"), ("b", "neg")]
    path = write(tmp_path / "a.csv", table(rows).encode("shift_jis"))
    assert read(path, encoding="shift_jis")[0] == [rows[0][0], "b"]
    for name in ("lines.txt", "a.jsonl"):
        text = "größer\n" if name == "lines.txt" else '{"text": "größer"}\n'
        path = write(tmp_path / name, text.encode("utf-16"))
        assert texts_of(SourceConfig(path=str(path))) == ["größer"]
        path = write(tmp_path / name, text.encode("cp850"))
        assert texts_of(SourceConfig(path=str(path), encoding="cp850")) == ["größer"]
    with pytest.raises(
        DataError, match=r"lines.txt: not utf-16 .*; set encoding to the file's own"
    ):
        texts_of(
            SourceConfig(path=str(write(tmp_path / "lines.txt", b"\xff\xfea")), encoding="utf-16")
        )
    for key, value in (("encoding", "utf-9"), ("delimiter", "::"), ("quote", "ab")):
        with pytest.raises(ConfigError, match=f"{key}='{value}': "):
            build(SourceConfig, {key: value}, "c.yaml")


@pytest.mark.parametrize("name", ["UP.TSV", "a.Csv", "b.tab", "c.TSV.gz"])
def test_suffixes_are_read_in_any_case(tmp_path, name):
    delimiter = "," if "sv" in name else "\t"
    path = write(tmp_path / name, table(GOOD[:4], delimiter).encode())
    assert read(path)[:2] == ([t for t, _ in GOOD[:4]], ["neg", "pos"] * 2)


@pytest.mark.parametrize("header", [None, False])
def test_a_table_without_a_header_has_numbered_columns(tmp_path, header):
    rows = [(str(n), "neg" if n % 2 else "pos", f"I liked it a lot {n}") for n in range(9)]
    path = write(tmp_path / "a.csv", table(rows, header=None).encode())
    texts, labels, _ = read(path, header=header, text_column=3, label_column=2)
    assert (texts, labels) == ([r[2] for r in rows], [r[1] for r in rows])
    with pytest.raises(DataError, match=r"no column 'text' .* to one of: 1, 2, 3 \(it h"):
        read(path, header=header)
    assert "no header" in describe(SourceConfig(path=str(path), header=header))[0]


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_columns_without_a_header_the_longer_is_the_text(tmp_path, order):
    rows = [(f"I liked it a lot, number {n}", "neg" if n % 2 else "pos") for n in range(9)]
    path = write(tmp_path / "a.csv", table([r[::order] for r in rows], header=None).encode())
    texts, labels, _ = read(path)
    assert list(zip(texts, labels, strict=True)) == rows
    (line,) = describe(SourceConfig(path=str(path)), labels=True)
    names = ("text", "label")[::order]
    assert f"no header, column 1 is {names[0]}, column 2 is {names[1]}" in line


def test_own_column_names_are_a_header(tmp_path):
    path = write(tmp_path / "a.csv", table(GOOD, header=("review body", "stars")).encode())
    with pytest.raises(
        DataError,
        match="no column 'text' and no column 'label'; set .* to one of: review body, stars",
    ):
        read(path)
    assert len(read(path, text_column="review body", label_column="stars")[0]) == len(GOOD)
    named = write(tmp_path / "b.csv", table(GOOD, header=("1", "2")).encode())
    assert len(read(named, header=True, text_column=1, label_column=2)[0]) == len(GOOD)


def test_quoting_is_found_or_set(tmp_path):
    rows = [(f'he said "no" {n}, and left', "pos" if n % 2 else "neg") for n in range(20)]
    escaped = table(rows, doublequote=False, escapechar="\\")
    assert read(write(tmp_path / "a.csv", escaped.encode()))[0] == [t for t, _ in rows]
    single = table([(f"one, two {n}", "b") for n in range(9)] + [("x", "a")], quotechar="'")
    assert read(write(tmp_path / "b.csv", single.encode()))[0][:2] == ["one, two 0", "one, two 1"]
    spaced = 'text, label\n"a, b", pos\n"c, d", neg\n'
    assert read(write(tmp_path / "c.csv", spaced.encode()))[:2] == (
        ["a, b", "c, d"],
        ["pos", "neg"],
    )
    plain = "text\tlabel\n" + "".join(f'"good {n}\tpos\nbad\tneg\n' for n in range(9))
    path = write(tmp_path / "d.tsv", plain.encode())
    assert read(path)[0][:2] == ['"good 0', "bad"]
    assert "quote none" in describe(SourceConfig(path=str(path)))[0]
    stray = table(GOOD, "\t").replace("a text, number 7\t", '"a text, number 7\t')
    path = write(tmp_path / "e.tsv", stray.encode())
    assert len(read(path)[0]) == len(GOOD) - 1
    assert read(path, quote="none")[0][7] == '"a text, number 7'
    excel = "sep=;\r\n" + table(GOOD, ";")
    assert read(write(tmp_path / "f.csv", excel.encode()))[0] == [t for t, _ in GOOD]


def test_one_column_is_read_whole_where_nothing_is_quoted(tmp_path):
    path = write(tmp_path / "a.csv", b"text\ngood, really\nbad; no\n")
    assert texts_of(SourceConfig(path=str(path))) == ["good, really", "bad; no"]
    quoted = write(tmp_path / "b.csv", b'text\n"good, really"\n"bad; no"\n')
    assert texts_of(SourceConfig(path=str(quoted))) == ["good, really", "bad; no"]


def test_a_column_that_is_there_twice_is_an_error(tmp_path):
    path = write(tmp_path / "a.csv", b"text,text,label\na,b,c\n")
    with pytest.raises(DataError, match=r"a.csv: 2 columns have the name 'text'; rename one"):
        texts_of(SourceConfig(path=str(path)))


def test_a_header_in_the_middle_is_no_document(tmp_path):
    path = write(tmp_path / "a.csv", b"text,label\r\na,x\r\nText , label\r\ntext,label\r\nb,y\r\n")
    skipped = Counter()
    config = SourceConfig(path=str(path), on_bad_row="skip")
    found = [t for part in documents(config, skipped=skipped) for t in part["text"].to_pylist()]
    assert found == ["a", "Text", "b"]
    assert skipped == {"the header once more": 1}


def test_what_was_found_out_is_said_where_no_column_is_there(tmp_path):
    path = write(tmp_path / "a.csv", b"text^label\na^x\n")
    with pytest.raises(DataError, match="delimiter comma.*else set delimiter, or header: false"):
        next(documents(SourceConfig(path=str(path))))


def test_bytes_of_another_encoding_far_into_a_file_name_the_setting(tmp_path):
    rows = b"text,label\n" + b"plain ascii,x\n" * 80_000 + "schön,y\n".encode("latin-1")
    path = write(tmp_path / "a.csv", rows)
    with pytest.raises(DataError, match="row 80001: not UTF-8 .* set encoding, as cp1252, or fix"):
        list(documents(SourceConfig(path=str(path))))
