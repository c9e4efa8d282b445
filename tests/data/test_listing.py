"""Listing: globs, links, and files that are not read."""

import os
import re
import subprocess
import sys
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_files import texts_of, write

from raybert.data.sources.documents import describe, shards
from raybert.data.sources.listing import list_files
from raybert.data.sources.settings import SourceConfig
from raybert.errors import DataError, UserError


def names(path, **options):
    return [file.name for file in list_files(str(path), **options).files]


@pytest.mark.parametrize("links", [["."], [".", "."], ["..", "."], ["x", "x/y", "."]])
@pytest.mark.parametrize(
    "pattern", ["", "/**/*.txt", "/**", "/**/**/a.txt", "/*/*/*.txt", "/*/*.txt"]
)
def test_each_file_is_read_once_whatever_links_lead_to_it(tmp_path, links, pattern):
    base = tmp_path / "base"
    for name in ("a.txt", "x/a.txt", "x/y/a.txt"):
        write(base / name, name.encode())
    for number, target in enumerate(links):
        (base / f"link{number}").symlink_to(base / target)
    for place in ("x", "x/y"):
        (base / place / "up").symlink_to(base)
    found = list_files(f"{base}{pattern}", follow_links=".." in links)
    files = [os.path.realpath(file.uri) for file in found.files]
    assert len(files) == len(set(files)) > 0
    if "**" in pattern or not pattern:
        assert files == sorted(f"{base}/{name}" for name in ("a.txt", "x/a.txt", "x/y/a.txt"))


def test_links_out_of_the_source_are_refused_unless_they_are_asked_for(tmp_path):
    outside = write(tmp_path / "outside" / "b.txt", b"outside")
    base = write(tmp_path / "base" / "a.txt", b"inside").parent
    for name, target in (("file.txt", outside), ("folder", outside.parent)):
        (base / name).symlink_to(target)
        with pytest.raises(
            DataError, match=f"base/{name}: a link to .*, outside of {base}; remove it"
        ):
            texts_of(SourceConfig(path=str(base)))
        asked = SourceConfig(path=str(base), follow_links=True)
        assert texts_of(asked) == ["inside", "outside"]
        assert texts_of(SourceConfig(path=f"{base}/a*")) == ["inside"]  # it is not looked at
        (base / name).unlink()
    linked = tmp_path / "linked"
    linked.symlink_to(base)  # the user's own word
    assert texts_of(SourceConfig(path=str(linked))) == ["inside"]


def test_a_link_beside_its_file_is_counted(tmp_path):
    write(tmp_path / "b.txt", b"text")
    (tmp_path / "a.txt").symlink_to(tmp_path / "b.txt")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.txt")
    assert names(tmp_path) == [f"{tmp_path}/b.txt"]
    (line,) = describe(SourceConfig(path=str(tmp_path)))
    assert line.endswith(
        f"1 text file; left out: links to files that are read: {tmp_path}/a.txt; "
        f"links to nothing: {tmp_path}/gone.txt; no regular files: {tmp_path}/pipe.txt"
    )
    with pytest.raises(DataError, match=r"pipe.txt: no regular file or folder"):
        shards(SourceConfig(path=str(tmp_path / "pipe.txt")))


SCRIPT = """
import os, sys
from raybert.data.sources.listing import list_files
os.setuid(65534)
for pattern in sys.argv[2:]:
    found = list_files(sys.argv[1] + pattern)
    print([file.name for file in found.files], found.left_out)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up root's rights, which read every folder")
def test_folders_that_can_not_be_read_are_named_where_the_pattern_enters_them(tmp_path):
    for folder in (tmp_path, *tmp_path.parents):
        if os.stat(folder).st_uid == os.geteuid() and folder.is_relative_to(tempfile.gettempdir()):
            os.chmod(folder, os.stat(folder).st_mode | 0o055)
    for name in ("a.csv", "lost/b.csv", "x/c.csv"):
        write(tmp_path / name, b"text\na\n")
    os.chmod(tmp_path / "lost", 0)
    argv = [sys.executable, "-c", SCRIPT, str(tmp_path), "/*.csv", "/**/*.csv", "/*/c.csv"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    os.chmod(tmp_path / "lost", 0o755)
    assert done.stdout.splitlines() == [
        f"['{tmp_path}/a.csv'] ",
        f"['{tmp_path}/a.csv', '{tmp_path}/x/c.csv'] folders that can't be read: {tmp_path}/lost",
        f"['{tmp_path}/x/c.csv'] folders that can't be read: {tmp_path}/lost",
    ], done.stderr


def test_only_folders_that_match_are_listed(tmp_path, monkeypatch):
    for name in ("a.csv", "x/b.csv", "x/y/c.csv", "z/y/d.csv"):
        write(tmp_path / name, b"text\na\n")
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    for pattern, folders in (
        ("*.csv", [""]),
        ("x/*.csv", ["/x"]),
        ("*/*.csv", ["", "/x", "/z"]),
        ("[x]/y/*", ["", "/x", "/x/y"]),
    ):
        listed.clear()
        assert names(f"{tmp_path}/{pattern}")
        assert sorted(listed) == [f"{tmp_path}{folder}" for folder in folders]


def test_brackets_of_a_folder_that_exists_are_no_pattern(tmp_path):
    write(tmp_path / "a [1] dir" / "x.csv", b"text\na\n")
    write(tmp_path / "a [1] dir" / "y[2].csv", b"text\nb\n")
    folder = tmp_path / "a [1] dir"
    assert names(f"{folder}/*.csv") == [f"{folder}/x.csv", f"{folder}/y[2].csv"]
    assert names(f"{folder}/y[2].csv") == [f"{folder}/y[2].csv"]
    assert names(f"{tmp_path}/a [[]1] d?r/y[[]*") == [f"{folder}/y[2].csv"]
    with pytest.raises(
        DataError, match=r"no file matches; write \[\*\], \[\?\] and \[\[\] for these"
    ):
        list_files(f"{folder}/z*")


@given(st.text("ab*?[]!-_. (){}^$|\\+~'\"é\u2028", min_size=1, max_size=9))
@settings(max_examples=200, deadline=None)
def test_a_name_whose_signs_are_escaped_is_found(tmp_path_factory, name):
    if name in (".", "..") or name.startswith((".", "_")):
        return
    folder = tmp_path_factory.getbasetemp() / "escaped"
    folder.mkdir(exist_ok=True)
    write(folder / name, b"x")
    try:
        pattern = re.sub(r"[*?[]", lambda sign: f"[{sign[0]}]", name)
        assert names(f"{folder}/{pattern}") == [f"{folder}/{name}"]
        assert names(folder / name) == [f"{folder}/{name}"]
    finally:
        (folder / name).unlink()


def test_hidden_names_are_read_where_the_pattern_says_so(tmp_path):
    for name in ("_a.txt", ".b.txt", "c.txt", "_x/d.txt"):
        write(tmp_path / name, name.encode())
    assert names(tmp_path) == [f"{tmp_path}/c.txt"]
    assert names(f"{tmp_path}/_*.txt") == [f"{tmp_path}/_a.txt"]
    assert names(f"{tmp_path}/.*.txt") == [f"{tmp_path}/.b.txt"]
    assert names(f"{tmp_path}/_x/*.txt") == [f"{tmp_path}/_x/d.txt"]


def test_names_that_are_not_utf8_are_counted(tmp_path):
    write(tmp_path / "a.txt", b"text")
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "wb"):
        pass
    (line,) = describe(SourceConfig(path=str(tmp_path)))
    assert "1 text file; left out: names that are not UTF-8: " in line


def test_patterns_on_an_object_store_match_as_on_a_disk(bucket, tmp_path):
    for name in ("a.txt", "ab.txt", "x/a.txt", "x/y/a.txt", ".x/a.txt", "_a.txt", "x/.y/a.txt"):
        write(tmp_path / name, b"x")
        bucket.write_bytes(name, b"x")
    base, _, query = bucket.uri.partition("?")
    for pattern in (
        "*.txt",
        "[!a]*/*.txt",
        "**/a.txt",
        "x/**",
        "**.txt",
        "x**a.txt",
        "_*",
        "*/*/*",
    ):
        local = [name.removeprefix(str(tmp_path)) for name in names(f"{tmp_path}/{pattern}")]
        remote = [name.removeprefix(base) for name in names(f"{base}/{pattern}?{query}")]
        assert remote == local, pattern


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("loop.csv", "a link to nothing"),
        ("gone.csv", "a link to nothing"),
        ("a\0b.csv", "null byte"),
        ("\udcff.csv", "can't be opened"),
        ("x" * 5000, "can't be read"),
    ],
)
def test_a_path_that_no_file_can_have_is_refused_in_a_line(tmp_path, name, words):
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    (tmp_path / "gone.csv").symlink_to("nothing")
    for path in (f"{tmp_path}/{name}", f"{tmp_path}/{name}/*.csv"):
        with pytest.raises(UserError, match=words if path.endswith(name) else "csv|xxx"):
            list_files(path)


def test_errors_of_another_librarys_filesystem_are_a_line():
    pytest.importorskip("huggingface_hub")
    with pytest.raises(UserError, match="hf://datasets/imdb: can't be"):
        list_files("hf://datasets/imdb")
    with pytest.raises(UserError, match="download it first"):
        list_files("https://example.org/a.csv")
