"""Folders of a process: private, and deleted at the latest by the next process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raybert.cluster.scratch import PREFIXES, scratch_folder, sweep

_HELD = """
import sys, time
from pathlib import Path
from raybert.cluster.scratch import scratch_folder
with scratch_folder(sys.argv[1], Path(sys.argv[2])) as folder:
    (folder / "log").write_text("kept")
    print(folder, flush=True)
    time.sleep(60)
"""

_SWEPT = """
import sys
from pathlib import Path
from raybert.cluster.scratch import sweep
sweep(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_folder_of_a_killed_process_is_deleted_by_the_next(tmp_path, prefix):
    with subprocess.Popen(
        [sys.executable, "-c", _HELD, prefix, tmp_path], stdout=subprocess.PIPE, text=True
    ) as process:
        folder = Path(process.stdout.readline().strip())
        assert folder.stat().st_mode & 0o777 == 0o700
        sweep(tmp_path)
        assert (folder / "log").exists()  # it is in use
        process.send_signal(signal.SIGKILL)
    assert folder.exists()
    with scratch_folder(prefix, tmp_path) as mine:
        assert os.listdir(tmp_path) == [mine.name]
    assert os.listdir(tmp_path) == []


def test_after_an_error_the_logs_stay_until_the_next_start(tmp_path):
    with pytest.raises(RuntimeError), scratch_folder("rbr-", tmp_path, has_logs=True) as folder:
        raise RuntimeError(f"see {folder}")
    assert folder.exists()
    sweep(tmp_path)
    assert not folder.exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_other_folders_are_deleted_after_an_error(tmp_path, error):
    with pytest.raises(error), scratch_folder("rbs-", tmp_path):
        raise error
    assert os.listdir(tmp_path) == []


def test_a_fifo_in_the_place_of_a_lock_keeps_nobody_waiting(tmp_path):
    (tmp_path / f"{PREFIXES[0]}0").mkdir()
    os.mkfifo(tmp_path / f"{PREFIXES[0]}0" / "lock")
    process = subprocess.run(
        [sys.executable, "-c", _SWEPT, tmp_path], timeout=60, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr


def test_what_is_not_a_leftover_stays(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "lock").touch()
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "rbr-link").symlink_to(elsewhere)  # planted
    (folder / "rbr-new").mkdir()  # just being made: not locked yet
    (folder / "rbr-file").touch()
    (folder / "session").mkdir()
    sweep(folder)
    assert sorted(os.listdir(folder)) == ["rbr-file", "rbr-link", "rbr-new", "session"]
    assert (elsewhere / "lock").exists()
    old = time.time() - 2 * 86_400
    os.utime(folder / "rbr-new", (old, old))  # of a version that had no locks
    sweep(folder)
    assert not (folder / "rbr-new").exists()


@pytest.mark.ray
def test_a_ray_that_is_started_here_keeps_its_files_in_such_a_folder(ray_session):
    session = Path(ray_session._private.worker._global_node.get_session_dir_path())
    folder = session.parents[1]
    assert folder.name.startswith("rbr-")
    assert (folder.stat().st_mode & 0o777, folder.stat().st_uid) == (0o700, os.getuid())
    assert (folder / "lock").exists()


_KEYS = """
import os
import ray
from raybert.cluster.session import RayConfig, ray_session

with ray_session(RayConfig(object_store_gb=0.2)):
    task = ray.remote(lambda: "RAYBERT_API_KEYS" in os.environ)
    print(ray.get(task.remote()), "RAYBERT_API_KEYS" in os.environ)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_no_process_of_ray_has_the_keys_of_the_server(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _KEYS],
        env={**os.environ, "RAYBERT_API_KEYS": "k" * 32, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["False", "True"], done.stderr
