"""Ctrl-C and SIGTERM, at any moment: no signal is lost, and none crashes the interpreter."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
from commands import Experiment, start

from raybert.cluster import interrupts

ENDED = (130, 143, -signal.SIGINT, -signal.SIGTERM)  # before Python runs a line of ours, by itself


def run(code, *signals, pause=0.1):
    """Run a program until it prints a line, and send it signals: its exit code and output."""
    with subprocess.Popen(
        [sys.executable, "-c", "from raybert.cluster import interrupts\n" + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        for number in signals:
            process.send_signal(number)
            time.sleep(pause)
        out, err = process.communicate(timeout=20)
    return process.returncode, out, err


_WAITS = {
    "in a finalizer, which drops exceptions": """
class Slow:
    def __del__(self):
        print("ready", flush=True)
        time.sleep(5)
Slow()
""",
    "in a library that catches everything": """
print("ready", flush=True)
while True:
    try:
        time.sleep(5)
    except BaseException:
        pass
""",
    "outside of Python": """
import ctypes
print("ready", flush=True)
while True:  # the C library's own, which a signal interrupts
    ctypes.CDLL(None).pause()
""",
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", _WAITS)
def test_a_signal_ends_the_process_wherever_it_arrives(where, number):
    code = f"import time\ninterrupts.install('nothing was started')\n{_WAITS[where]}"
    assert run(code, number) == (130, "", "raybert: nothing was started\n")


_DEFERRED = """
import time
interrupts.install("at once")
try:
    with interrupts.deferred() as interrupted:
        print("ready", flush=True)
        interrupted.wait()
        {then}
except KeyboardInterrupt:
    print("in order")
"""


def test_where_a_state_is_saved_the_first_signal_is_a_request():
    assert run(_DEFERRED.format(then="time.sleep(0.2)"), signal.SIGTERM) == (0, "in order\n", "")


def test_the_second_signal_ends_the_process():
    found = run(_DEFERRED.format(then="time.sleep(60)"), signal.SIGINT, signal.SIGINT)
    assert found == (130, "", "raybert: at once\n")


def test_a_background_process_of_a_shell_ignores_ctrl_c():
    code = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
interrupts.install("ended")
print("ready", flush=True)
time.sleep(60)
"""
    assert run(code, signal.SIGINT, signal.SIGTERM) == (130, "", "raybert: ended\n")


def test_the_processes_of_an_ended_one_end_and_its_folder_is_deleted(tmp_path):
    code = f"""
import psutil, subprocess, sys, time
from pathlib import Path
from raybert.cluster.scratch import scratch_folder
interrupts.install("ended")
with scratch_folder("rbr-", Path({str(tmp_path)!r})):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path({str(tmp_path)!r}, "child").write_text(str(child.pid))
    print("ready", flush=True)
    time.sleep(60)
"""
    assert run(code, signal.SIGINT)[0] == 130
    child = int((tmp_path / "child").read_text())
    with contextlib.suppress(psutil.NoSuchProcess):  # nobody may have taken its exit code yet
        assert psutil.Process(child).wait(10) or psutil.Process(child).status() == "zombie"
    assert os.listdir(tmp_path) == ["child"]


def test_an_event_that_nobody_looks_at_is_raised_at_the_end():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts.deferred() as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert interrupted.is_set()
    assert signal.getsignal(signal.SIGINT) == before


def interrupted_start(command, moment, number, folder):
    """Send a command a signal a moment after its start, and return its exit code."""
    with start(*command, cwd=folder) as process:
        time.sleep(moment)
        process.send_signal(number)
        try:
            _, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert "Traceback" not in err or process.returncode < 0, err
    return process.returncode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", [0.2, 0.8])
def test_a_command_that_imports_ends(tmp_path, moment, number):
    assert interrupted_start(["pretrain", "-n", "x"], moment, number, tmp_path) in ENDED


@pytest.mark.slow
@pytest.mark.ray
def test_a_command_ends_at_any_moment_of_its_start(tmp_path):
    """Of its imports, of Ray's start and of the workers'."""
    experiment = Experiment(tmp_path)
    command = ["pretrain", "-c", experiment.config, "--set", "pretrain.steps=1000000"]
    draw, count, found = random.Random(0), 24, []
    for index in range(count):
        number = (signal.SIGINT, signal.SIGTERM)[index % 2]
        moment = 0.1 + 25 * (index + draw.random()) / count
        code = interrupted_start(command, moment, number, tmp_path)
        found.append((round(moment, 2), number.name, code))
    assert [one for one in found if one[2] not in ENDED] == []
