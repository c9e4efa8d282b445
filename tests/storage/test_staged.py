"""A file that is written in pieces: whole or not at all, whoever else writes it."""

import os
import threading

import pytest

from raybert.errors import StorageError
from raybert.storage import exclusive
from raybert.storage.folder import Folder
from raybert.storage.staged import staged_file


def test_it_replaces_the_old_file_at_the_end(anywhere):
    anywhere.write_text("a", "old")
    with staged_file(anywhere, "a") as stream:
        stream.write(b"new ")
        assert anywhere.read_text("a") == "old"
        stream.write(b"file")
    assert anywhere.read_text("a") == "new file"
    assert anywhere.names(hidden=True) == ["a"]


def test_after_an_error_the_old_file_stays_and_nothing_else_does(anywhere):
    anywhere.write_text("a", "old")
    with pytest.raises(ZeroDivisionError), staged_file(anywhere, "a") as stream:
        stream.write(b"half")
        1 / 0  # noqa: B018
    assert anywhere.read_text("a") == "old"
    assert anywhere.names(hidden=True) == ["a"]


def test_of_several_writers_one_wins_with_a_whole_file(anywhere):
    together = threading.Barrier(4)

    def write(letter):
        with staged_file(anywhere, "a") as stream:
            together.wait()
            for _ in range(100):
                stream.write(letter * 1000)
            together.wait()

    threads = [threading.Thread(target=write, args=(bytes([65 + i]),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    data = anywhere.read_bytes("a")
    assert len(data) == 100_000 and len(set(data)) == 1
    assert anywhere.names(hidden=True) == ["a"]


class Known:
    """Temporary names that an attacker could guess."""

    hex = "0" * 32


@pytest.mark.parametrize("how", ["staged", "written", "created"])
def test_a_planted_link_is_not_followed(tmp_path, monkeypatch, how):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    here = tmp_path / "here"
    here.mkdir()
    for length in (8, 32):
        (here / f".a.{Known.hex[:length]}").symlink_to(victim)
    monkeypatch.setattr("uuid.uuid4", Known)
    with pytest.raises((StorageError, FileExistsError)):
        if how == "staged":
            with staged_file(Folder(here), "a") as stream:
                stream.write(b"over it")
        elif how == "written":
            Folder(here).write_bytes("a", b"over it")
        else:
            exclusive.create_json(Folder(here), "a", "over it")
    assert victim.read_text() == "precious"
    assert not (here / "a").exists()


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")
    with (
        open("/dev/full", "wb", buffering=0) as full,
        monkeypatch.context() as patch,
        pytest.raises(StorageError, match=r"^writing .*/a failed: No space left on device$"),
        staged_file(Folder(tmp_path), "a") as stream,
    ):
        patch.setattr(os, "fsync", lambda number: full.write(b"x"))
        stream.write(b"new")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"
