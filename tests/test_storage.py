"""Storage: a file is there whole or not at all, and what goes wrong is said in our words."""

import errno
import os
import pickle
import subprocess
import sys

import pytest

from raybert.errors import DamagedError, StorageError, UserError
from raybert.storage import Folder


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def test_what_is_written_is_read(folder):
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


def test_what_is_not_there(folder):
    assert not folder.exists("none")
    assert folder.exists()
    assert folder.size("none") is None
    assert (folder / "none").names() == []
    assert (folder / "none").sizes() == {}
    folder.delete("none")
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("none")
    with pytest.raises(FileNotFoundError):
        folder.open_input("none")


@pytest.mark.parametrize("address", ["local", "mock:///elsewhere"])
def test_a_file_in_pieces_is_one_file(folder, address):
    folder = folder if address == "local" else Folder(address)
    folder.filesystem.create_dir(folder.path)
    folder.write_bytes("a", [memoryview(b"abc"), memoryview(b""), memoryview(b"de")])
    assert folder.read_bytes("a") == b"abcde"
    assert folder.sizes() == {"a": 5}


def test_delete_takes_files_and_folders(folder):
    folder.write_text("a", "x")
    folder.write_text("b/c/d", "x")
    folder.delete("a")
    folder.delete("b")
    assert folder.names() == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(folder, tmp_path, monkeypatch):
    folder.write_text("a", "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("raybert.storage.os.fsync", full)
    with pytest.raises(StorageError, match=rf"^writing {tmp_path}/a failed: No space left on dev"):
        folder.write_text("a", "new")
    assert folder.read_text("a") == "old"
    assert os.listdir(tmp_path) == ["a"]


_KILLED = """
import os, signal, sys
from raybert import storage
storage.os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
storage.Folder(sys.argv[1]).write_text("a", "new")
"""


def test_a_writer_killed_in_the_middle_leaves_the_old_file(folder, tmp_path):
    folder.write_text("a", "old")
    done = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], timeout=60)
    assert done.returncode == -9
    assert folder.read_text("a") == "old"
    assert len(os.listdir(tmp_path)) == 2  # what was begun is still beside it
    assert folder.names() == ["a"]  # and does not show


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
    """/dev/full takes no byte: the kernel's own ENOSPC."""
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    with pytest.raises(OSError) as caught, open("/dev/full", "wb") as file:
        file.write(b"x" * 100_000)
    monkeypatch.setattr(
        "raybert.storage._write_local", lambda path, data: (_ for _ in ()).throw(caught.value)
    )
    with pytest.raises(StorageError, match="No space left on device"):
        Folder("/dev").write_bytes("full", b"x")


def test_json_cut_short_is_damage(folder):
    folder.write_text("a.json", '{"a": 1')
    with pytest.raises(DamagedError, match="a.json is damaged: it is not JSON"):
        folder.read_json("a.json")
    folder.write_bytes("b.json", b'"\xff"')
    with pytest.raises(DamagedError, match="b.json is damaged"):
        folder.read_json("b.json")


@pytest.mark.parametrize("address", ["nope://bucket/x", "://x"])
def test_an_address_that_nothing_opens(address):
    with pytest.raises(UserError, match=f"^{address}: can't be opened: "):
        Folder(address)


def test_a_folder_travels_by_pickle(folder, tmp_path):
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


def test_the_query_of_an_object_store_stays_behind_the_path():
    folder = Folder("s3://bucket/runs?endpoint_override=localhost:1&scheme=http&region=x") / "mine"
    assert folder.path == "bucket/runs/mine"
    assert folder.uri == "s3://bucket/runs/mine?endpoint_override=localhost:1&scheme=http&region=x"
    assert str(folder) == "s3://bucket/runs/mine"
    assert folder.join("a") == "bucket/runs/mine/a"
    assert not folder.is_local
    assert pickle.loads(pickle.dumps(folder)).uri == folder.uri


@pytest.fixture
def bucket(monkeypatch):
    server = pytest.importorskip(
        "moto.server", reason="moto is not installed: nothing here speaks S3"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    running = server.ThreadedMotoServer(port=0)
    running.start()
    try:
        host, port = running.get_host_and_port()
        address = f"s3://bucket/runs?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
        Folder(address).filesystem.create_dir("bucket")
        yield Folder(address)
    finally:
        running.stop()


def test_an_object_store_does_what_a_disk_does(bucket):
    folder = bucket / "mine"
    folder.write_text("a", "old")
    folder.write_text("a", "new")
    folder.write_json("sub/b.json", [1])
    assert folder.read_text("a") == "new"
    assert folder.names() == ["a", "sub"]
    assert folder.size("a") == 3
    assert folder.sizes() == {"a": 3}
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("none")
    folder.delete("sub")
    folder.delete("a")
    assert folder.names() == []
