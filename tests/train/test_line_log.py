"""A log of lines: readers see whole lines only, and no line is lost while a storage refuses."""

import resource
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raybert.storage.folder import Folder
from raybert.train import line_log
from raybert.train.line_log import LineLog


@pytest.fixture
def at_once(monkeypatch):
    """Retry at every line."""
    monkeypatch.setattr(line_log, "RETRY_SECONDS", 0.0)


@contextmanager
def files_of_at_most(size):
    """Limit the size of files: the kernel accepts a part of a longer write, as a full disk does."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


LINES = st.lists(
    st.tuples(st.text("abcü ", max_size=30), st.one_of(st.none(), st.integers(0, 40))), max_size=20
)


@settings(max_examples=100, deadline=None)
@given(LINES)
def test_a_reader_sees_whole_lines_only_and_after_close_all_of_them(lines):
    """Each line comes with the bytes that are left on the disk then; None: enough."""
    before, line_log.RETRY_SECONDS = line_log.RETRY_SECONDS, 0.0
    try:
        with tempfile.TemporaryDirectory() as folder:
            path, messages = Path(folder) / "sub" / "log", []
            log = LineLog(Folder(folder) / "sub", "log", messages.append)
            written = b""
            for text, room in lines:
                size = path.stat().st_size if path.exists() else 0
                if room is None:
                    log.write(text)
                else:
                    with files_of_at_most(size + room):
                        log.write(text)
                written += f"{text}\n".encode()
                found = path.read_bytes() if path.exists() else b""
                assert written.startswith(found)
                assert found == b"" or found.endswith(b"\n")
                # One message for a failure, one for its end.
                assert len(messages) % 2 == (found != written)
            log.close()
            assert (path.read_bytes() if path.exists() else b"") == written
            assert len(messages) % 2 == 0
    finally:
        line_log.RETRY_SECONDS = before


def test_a_failure_is_reported_once_and_so_is_its_end(tmp_path, at_once):
    folder, messages = Folder(tmp_path) / "sub", []
    (tmp_path / "sub").write_text("a file where the folder should be")
    log = LineLog(folder, "log", messages.append)
    for number in range(3):
        log.write(str(number))
    [failure] = messages
    assert failure.startswith(f"writing {tmp_path}/sub/log failed: ")
    assert failure.endswith("; its lines wait until it can be written")
    (tmp_path / "sub").unlink()
    log.write("3")
    log.write("4")
    assert messages[1:] == [f"{tmp_path}/sub/log is written again"]
    log.close()
    assert folder.read_text("log") == "0\n1\n2\n3\n4\n"
    assert len(messages) == 2


def test_a_storage_that_refuses_is_not_retried_at_every_line(tmp_path, monkeypatch):
    monkeypatch.setattr(line_log, "RETRY_SECONDS", 1e9)
    (tmp_path / "sub").write_text("in the way")
    log = LineLog(Folder(tmp_path) / "sub", "log")
    log.write("a")
    (tmp_path / "sub").unlink()
    log.write("b")
    assert not (tmp_path / "sub").exists()
    log.flush()  # before a checkpoint, after which these lines would not come again
    assert (tmp_path / "sub" / "log").read_text() == "a\nb\n"
    log.close()


def test_pending_lines_are_bounded_and_lost_ones_are_reported(tmp_path, at_once, monkeypatch):
    monkeypatch.setattr(line_log, "MAX_PENDING_BYTES", 20)
    (tmp_path / "sub").write_text("in the way")
    messages = []
    log = LineLog(Folder(tmp_path) / "sub", "log", messages.append)
    for number in range(10, 20):
        log.write(f"line {number}")  # eight bytes with its end
    (tmp_path / "sub").unlink()
    log.write("line 20")
    log.close()
    assert (tmp_path / "sub" / "log").read_text() == "line 18\nline 19\nline 20\n"
    assert messages[1] == f"{tmp_path}/sub/log is written again, without 8 lines"


def test_lines_that_are_never_written_are_reported_at_the_end(tmp_path, at_once):
    (tmp_path / "sub").write_text("in the way")
    messages = []
    log = LineLog(Folder(tmp_path) / "sub", "log", messages.append)
    log.write("a")
    log.write("b")
    log.close()
    assert messages[1:] == [f"{tmp_path}/sub/log lacks the last 2 lines"]


def test_on_an_object_store_lines_are_written_by_a_flush(bucket):
    log = LineLog(bucket / "sub", "log")
    log.write("a")
    assert not (bucket / "sub").exists("log")
    log.flush()
    assert (bucket / "sub").read_text("log") == "a\n"
    log.write("b")
    log.close()
    assert (bucket / "sub").read_text("log") == "a\nb\n"


def test_no_line_is_lost_while_an_object_store_refuses(bucket, proxy, at_once):
    through, connection = proxy
    messages = []
    log = LineLog(through, "log", messages.append)
    log.write("a")
    log.flush()
    connection.refuse()
    for line in "bc":
        log.write(line)
        log.flush()
    assert bucket.read_text("log") == "a\n"
    connection.mend()
    log.write("d")
    log.flush()
    assert bucket.read_text("log") == "a\nb\nc\nd\n"
    log.close()
    assert [text.rpartition(" ")[2] for text in messages] == ["written", "again"]
