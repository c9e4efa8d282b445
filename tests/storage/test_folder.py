"""Folders: files appear whole or not at all, and every failure is a StorageError."""

import errno
import os
import pickle
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from raybert.errors import DamagedError, StorageError, UserError
from raybert.storage.exclusive import numbers_taken, take_number
from raybert.storage.folder import Folder


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def test_a_written_file_is_read_back(anywhere):
    folder = anywhere
    folder.write_bytes("a.bin", b"\x00\xff")
    folder.write_text("sub/b.txt", "Grüße\n")
    (folder / "sub").write_json("c.json", {"ü": [1, None]})
    assert folder.read_bytes("a.bin") == b"\x00\xff"
    assert (folder / "sub").read_text("b.txt") == "Grüße\n"
    assert folder.read_json("sub/c.json") == {"ü": [1, None]}
    assert folder.names() == ["a.bin", "sub"]
    assert folder.names("sub") == ["b.txt", "c.json"]
    assert folder.size("a.bin") == 2
    assert folder.sizes() == {"a.bin": 2}
    with folder.open_input("sub/b.txt") as file:
        assert file.read_at(3, 0) == b"Gr\xc3"
    folder.write_text("sub/b.txt", "new")
    assert folder.read_text("sub/b.txt") == "new"


def test_a_missing_file_or_folder(anywhere):
    folder = anywhere
    folder.write_text("there", "x")
    assert not folder.exists("none")
    assert folder.exists()
    assert not (folder / "none").exists()
    assert folder.size("none") is None
    assert (folder / "none").names() == []
    assert (folder / "none").sizes() == {}
    folder.delete("none")
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("none")
    with pytest.raises(FileNotFoundError):
        folder.open_input("none")


@pytest.mark.parametrize("address", ["local", "mock:///elsewhere"])
def test_a_file_in_pieces_is_one_file(tmp_path, address):
    folder = Folder(tmp_path if address == "local" else address)
    folder.filesystem.create_dir(folder.path)
    folder.write_bytes("a", [memoryview(b"abc"), memoryview(b""), memoryview(b"de")])
    assert folder.read_bytes("a") == b"abcde"
    assert folder.sizes() == {"a": 5}


def test_files_and_folders_are_deleted(anywhere):
    folder = anywhere
    folder.write_text("a", "x")
    folder.write_text("b/c/d", "x")
    folder.delete("a")
    folder.delete("b")
    assert folder.names() == []


@pytest.mark.parametrize("name", ["two words", "50%", "a%20b", "what?", "#1", "Grüße"])
def test_names_may_have_any_characters(anywhere, name):
    (anywhere / name).write_text("a", name)
    assert anywhere.names() == [name]
    assert Folder((anywhere / name).uri).read_text("a") == name
    folder, file = Folder.of_file((anywhere / name / "a").uri)
    assert (folder.read_text(file), file) == (name, "a")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(folder, tmp_path, monkeypatch):
    folder.write_text("a", "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("raybert.storage.folder.os.fsync", full)
    with pytest.raises(StorageError, match=rf"^writing {tmp_path}/a failed: No space left on dev"):
        folder.write_text("a", "new")
    assert folder.read_text("a") == "old"
    assert os.listdir(tmp_path) == ["a"]


_KILLED = """
import os, signal, sys
from raybert.storage.folder import Folder
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
Folder(sys.argv[1]).write_text("a", "new")
"""


def test_a_writer_killed_in_the_middle_leaves_the_old_file(folder, tmp_path):
    folder.write_text("a", "old")
    done = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], timeout=60)
    assert done.returncode == -9
    assert folder.read_text("a") == "old"
    assert len(os.listdir(tmp_path)) == 2  # the unfinished file is still there
    assert folder.names() == ["a"]  # and hidden


def test_a_file_where_a_folder_should_be_is_a_storage_error(folder):
    folder.write_text("a", "x")
    with pytest.raises(StorageError, match="writing .*/a/b failed: "):
        folder.write_text("a/b", "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_a_storage_error(folder, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="Permission denied"):
            folder.write_text("a", "x")
    finally:
        tmp_path.chmod(0o700)


def test_a_full_device_is_a_storage_error(monkeypatch):
    """The kernel's own ENOSPC, from /dev/full."""
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    with pytest.raises(OSError) as caught, open("/dev/full", "wb") as file:
        file.write(b"x" * 100_000)
    monkeypatch.setattr(
        "raybert.storage.folder.new_file", lambda path: (_ for _ in ()).throw(caught.value)
    )
    with pytest.raises(StorageError, match="No space left on device"):
        Folder("/dev").write_bytes("full", b"x")


def test_truncated_json_is_damaged(folder):
    folder.write_text("a.json", '{"a": 1')
    with pytest.raises(DamagedError, match="a.json is damaged: it is not JSON"):
        folder.read_json("a.json")
    folder.write_bytes("b.json", b'"\xff"')
    with pytest.raises(DamagedError, match="b.json is damaged"):
        folder.read_json("b.json")


def test_a_folder_can_be_pickled(folder, tmp_path):
    folder.write_text("sub/a", "x")
    inside = pickle.loads(pickle.dumps(folder / "sub"))
    assert inside.read_text("a") == "x"
    assert inside.uri == str(tmp_path / "sub")


def test_a_relative_path_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Folder("runs")
    monkeypatch.chdir("/")
    folder.write_text("a", "x")  # workers have other working directories
    assert (tmp_path / "runs" / "a").read_text() == "x"


def test_a_file_uri_is_a_local_folder(tmp_path):
    folder = Folder(f"file://{tmp_path}")
    assert folder.is_local
    (folder / "b").write_text("a", "x")
    assert (tmp_path / "b" / "a").read_text() == "x"


def test_the_query_of_an_object_store_is_no_part_of_the_path():
    folder = Folder("s3://bucket/runs?endpoint_override=localhost:1&scheme=http&region=x") / "mine"
    assert folder.path == "bucket/runs/mine"
    assert folder.uri == "s3://bucket/runs/mine?endpoint_override=localhost:1&scheme=http&region=x"
    assert str(folder) == "s3://bucket/runs/mine"
    assert folder.join("a") == "bucket/runs/mine/a"
    assert not folder.is_local
    assert pickle.loads(pickle.dumps(folder)).uri == folder.uri


def test_a_bucket_is_no_file():
    with pytest.raises(UserError, match="^s3://bucket: names a bucket"):
        Folder.of_file("s3://bucket")


def test_of_many_who_take_a_number_at_once_each_gets_its_own(anywhere):
    with ThreadPoolExecutor(8) as threads:
        taken = list(threads.map(lambda _: take_number(anywhere), range(16)))
    assert len(set(taken)) == 16
    assert set(taken) <= set(numbers_taken(anywhere))
    assert take_number(anywhere) > max(taken)


# Object stores that do not answer ----------------------------------------------------------------


def at(port, monkeypatch, tries=1):
    monkeypatch.setattr("raybert.storage.folder._TRIES", tries)
    monkeypatch.setattr("raybert.storage.folder._REQUEST_TIMEOUT_S", 1)
    query = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    return Folder(f"s3://bucket/x?{query}")


def check_fails_in_one_line(folder):
    with pytest.raises(StorageError, match=r"^writing bucket/x/a failed: .") as failed:
        folder.write_text("a", "x")
    assert "\n" not in str(failed.value)
    for look in (folder.names, lambda: folder.exists("a"), lambda: folder.read_text("a")):
        with pytest.raises(StorageError, match=r"^(listing|looking up|reading) bucket/x.* failed"):
            look()


def test_an_endpoint_that_refuses_connections_is_a_storage_error(credentials, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    check_fails_in_one_line(at(port, monkeypatch, tries=2))


def test_an_endpoint_that_never_answers_is_a_storage_error(credentials, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts, nobody answers
        check_fails_in_one_line(at(silent.getsockname()[1], monkeypatch))


def test_a_missing_bucket_is_a_storage_error(bucket):
    folder = Folder(bucket.uri.replace("//tests/", "//none/"))
    with pytest.raises(StorageError, match="^writing none/.* failed: .*NO_SUCH_BUCKET"):
        folder.write_text("a", "x")


def test_an_interrupted_upload_leaves_the_old_file(bucket, proxy):
    bucket.write_text("a", "before")
    through, connection = proxy
    connection.cut(after=20_000)
    with pytest.raises(StorageError, match="^writing .*/a failed: "):
        through.write_bytes("a", bytes(100_000))
    assert bucket.read_text("a") == "before"
    connection.mend()
    through.write_bytes("a", b"after")
    assert bucket.read_text("a") == "after"
