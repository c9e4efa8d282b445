"""Submitting to a cluster: a real head with a token, real jobs, real refusals."""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from making import MODEL, reviews, write_csv

from raybert import jobs
from raybert.config import Settings
from raybert.display import FOLLOWED, Display
from raybert.errors import ConfigError, UserError
from raybert.experiment import Experiment
from raybert.storage import Folder
from raybert.submit import check

RAYBERT = Path(sys.executable).with_name("raybert")


# Without a cluster -------------------------------------------------------------------------------


def test_a_package_is_code_and_configuration(tmp_path):
    size = jobs.package(tmp_path, Settings())
    files = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert {"experiment.yaml", "raybert/cli.py", "raybert/demo.yaml"} <= files
    assert not [name for name in files if "__pycache__" in name]
    assert 100_000 < size < 2_000_000


def test_a_large_file_is_named_and_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "MOST_BYTES", 1000)
    with pytest.raises(UserError, match=r"^the package has .* MB: .*/raybert/.*\.py has"):
        jobs.package(tmp_path, Settings())


@pytest.mark.parametrize(
    ("command", "values", "words"),
    [
        ("corpus", {"run": {"storage": "runs"}}, "run.storage=runs is relative"),
        (
            "corpus",
            {"run": {"storage": "s3://b/runs"}, "corpus": {"source": {"path": "a.csv"}}},
            "corpus.source: a.csv is relative",
        ),
        (
            "finetune",
            {"run": {"storage": "/runs"}, "finetune": {"initialize_from": "bert/"}},
            "finetune.initialize_from: bert/ is relative",
        ),
        ("serve", {"run": {"storage": "/runs"}}, "submit serve: choose one of corpus, pretrain"),
        (
            "tune",
            {"run": {"storage": "/runs"}, "tune": {"space": {"finetune.lrr": {"uniform": [0, 1]}}}},
            "tune.space: unknown key finetune.lrr; did you mean finetune.lr",
        ),
    ],
)
def test_what_only_this_machine_could_read_is_refused(command, values, words):
    with pytest.raises(ConfigError, match=f"^{words}"):
        check(Experiment.model_validate(values), command)


def test_what_all_nodes_read_may_be_submitted():
    values = {
        "run": {"storage": "s3://bucket/runs"},
        "corpus": {"source": {"path": ["/data/a.csv", "gs://b/c.parquet"]}},
        "finetune": {"source": {"path": "sample:imdb"}},
    }
    for command in ("corpus", "pretrain", "finetune", "evaluate", "tune", "run"):
        check(Experiment.model_validate(values), command)


def test_an_address_where_nobody_answers():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(UserError, match=rf"^--address 127.0.0.1:{port}: nobody answers"):
        jobs.Cluster(f"127.0.0.1:{port}")
    with pytest.raises(UserError, match="the dashboard's address"):
        jobs.Cluster("ray://head:10001")


def test_progress_of_a_followed_job_is_rewritten_not_repeated(capsys, monkeypatch):
    monkeypatch.setenv(FOLLOWED, "1")
    far = Display()
    with far.stage("corpus"):
        far.say("said")
    log = capsys.readouterr().err.splitlines()
    monkeypatch.delenv(FOLLOWED)
    near = Display()
    near._live = True
    for line in log:
        near.relay(line)
    shown = capsys.readouterr().err
    assert "starting" in shown and "\r\x1b[2K" in shown
    assert "\x1f" not in shown
    assert shown.endswith("said\n")


# With one ----------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@dataclass
class Head:
    """A head of a test's own."""

    folder: Path  # of Ray's temporary files
    address: str  # of the dashboard
    gcs: str  # of the head itself: what drivers connect to
    env: dict  # of those who may

    @property
    def token(self):
        return (self.folder / "token").read_text()


@contextmanager
def ray_head():
    """Start a head with a token, as `ray start` makes one."""
    folder = Path("/tmp") / f"raybert-head-{secrets.token_hex(4)}"  # sockets want a short path
    folder.mkdir()
    token = folder / "token"
    token.write_text(secrets.token_hex(16))
    token.chmod(0o600)
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # what Ray Train leaves on it never leaves
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}",
    }
    port, gcs_port = free_port(), free_port()
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"),
        *("--node-ip-address=127.0.0.1", f"--port={gcs_port}", f"--dashboard-port={port}"),
        f"--dashboard-agent-listen-port={free_port()}",  # its own is one port for all of a machine
        *("--num-cpus=4", "--object-store-memory=300000000", f"--temp-dir={folder}"),
        "--disable-usage-stats",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            wait_for_dashboard(port, process, folder)
            yield Head(folder, f"http://127.0.0.1:{port}", f"127.0.0.1:{gcs_port}", env)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def head():
    """The address of a head, and the environment of those who may use it."""
    with ray_head() as started:
        yield started.address, started.env


def wait_for_dashboard(port, process, folder):
    ends = time.monotonic() + 90
    while time.monotonic() < ends:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=2)
        except urllib.error.HTTPError:
            return  # it asks for the token
        except OSError:
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.5)
        else:
            return
    pytest.fail("the head does not come up")


def call(head, *arguments, **more):
    address, env = head
    return subprocess.run(
        [str(RAYBERT), *map(str, arguments), "--address", address],
        env={**env, **more},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A tiny experiment that any node of this machine reads."""
    path = tmp_path_factory.mktemp("submit")
    texts = write_csv(Folder(path), "labelled.csv", reviews(160))
    values = {
        "run": {"name": "tiny-1", "storage": str(path / "runs")},
        "corpus": {
            "source": {"path": texts},
            "tokenizer": {"kind": "words", "vocab_size": 512, "min_frequency": 1},
            "seq_len": 16,
            "heldout_fraction": 0.1,
            "rows_per_part": 16,
            "rows_per_group": 4,
        },
        "model": MODEL,
        "pretrain": {
            "steps": 100_000,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "evaluations": 1,
            "threads": 1,
            "checkpoint_minutes": None,
            "examples": [],
        },
    }
    file = path / "tiny.yaml"
    file.write_text(json.dumps(values))
    return file


@pytest.mark.ray
def test_without_the_token_or_with_another_it_is_refused(head):
    address, env = head
    bare = {k: v for k, v in env.items() if not k.startswith("RAY_")}
    for more in ({}, {"RAY_AUTH_TOKEN": "wrong" * 8}):
        begun = time.monotonic()
        done = subprocess.run(
            [str(RAYBERT), "jobs", "--address", address],
            env={**bare, "HOME": "/nonexistent", **more},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert "ray get-auth-token" in done.stderr.splitlines()[-1]
        assert ("refuses your token" in done.stderr) == bool(more)
        assert time.monotonic() - begun < 30  # it does not retry for minutes


@pytest.mark.ray
def test_a_corpus_is_made_by_a_job_once(head, config):
    done = call(head, "submit", "corpus", "-c", config, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    ended = json.loads(done.stdout.splitlines()[-1])
    assert (ended["status"], ended["exit_code"]) == ("SUCCEEDED", 0)
    assert ended["result"]["rows"]["train"] > 50
    assert (config.parent / "runs/tiny-1/corpus/manifest.json").exists()

    again = call(head, "submit", "corpus", "-c", config)
    assert again.returncode == 0, again.stderr
    assert "is made already" in again.stderr

    listed = json.loads(call(head, "jobs", "--json").stdout)["jobs"]
    mine = [job for job in listed if job["command"] == "corpus"]
    assert [job["run"] for job in mine] == ["tiny-1", "tiny-1"]
    assert all(job["status"] == "SUCCEEDED" for job in mine)


@pytest.mark.ray
def test_a_mistake_ends_with_the_jobs_line_and_exit_code(head, config):
    done = call(head, "submit", "finetune", "-c", config, "--set", "run.name=nothing")
    assert done.returncode == 2, done.stderr
    assert "run `raybert pretrain` first" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.ray
def test_a_run_has_one_job_which_can_be_followed_and_stopped(head, config):
    assert call(head, "submit", "corpus", "-c", config).returncode == 0
    first = call(head, "submit", "pretrain", "-c", config, "--no-wait", "--json")
    assert first.returncode == 0, first.stderr
    job = json.loads(first.stdout)["id"]
    told = first.stderr.splitlines()
    assert "parameters; at most 4 checkpoints of " in told[0]
    assert "100,000 steps" in told[1] and "assumed 50 GFLOP/s on a core" in told[1]
    assert f"submitted {job} to " in told[2] and ", package " in told[2]
    second = call(head, "submit", "pretrain", "-c", config, "--no-wait", "--json")
    assert json.loads(second.stdout)["id"] == job
    assert "is at work already" in second.stderr
    assert "estimate" not in second.stderr

    address, env = head
    lines = []
    with subprocess.Popen(
        [str(RAYBERT), "logs", "tiny-1", "--address", address],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as follower:
        for line in follower.stderr:  # it ends with the job, which is far from its end
            lines.append(line)
            if "step " in line:
                break
        follower.send_signal(signal.SIGINT)
        lines += follower.stderr
        assert follower.wait(30) == 130
    assert any("detached" in line for line in lines)
    assert any("no problem in 9 checks" in line for line in lines)

    stopped = call(head, "stop", "tiny-1", "--json")
    assert json.loads(stopped.stdout) == {"job": job, "stopped": True}
    ends = time.monotonic() + 120
    while time.monotonic() < ends:
        listed = json.loads(call(head, "jobs", "--json").stdout)["jobs"]
        status = next(one["status"] for one in listed if one["id"] == job)
        if status not in ("PENDING", "RUNNING"):
            break
    assert status == "STOPPED"
    assert "go on" in call(head, "logs", "tiny-1").stdout
    checkpoints = config.parent / "runs/tiny-1/pretrain/checkpoints"
    assert list(checkpoints.glob("step-*.json")), "stopped without a checkpoint"


@pytest.mark.ray
def test_the_doctor_visits_the_cluster(head, config):
    done = call(head, "doctor", "-c", config, "--json")
    assert done.returncode == 0, done.stderr
    found = {one["name"]: one for one in json.loads(done.stdout)["findings"]}
    # /dev/shm is small in some containers.
    assert {one["status"] for name, one in found.items() if name != "memory"} == {"ok"}, found
    assert found["token"]["message"].startswith("on")
    assert "summed up in" in done.stderr
    listed = json.loads(call(head, "jobs", "--json").stdout)["jobs"]
    assert [job["status"] for job in listed if job["command"] == "doctor"] == ["SUCCEEDED"]
    # A visit is no part of the run that it was for.
    assert "summed up in" not in call(head, "logs", "tiny-1", "--no-follow").stdout


@pytest.mark.ray
def test_what_the_doctor_minds_ends_with_its_line_and_exit_code(head, config):
    done = call(head, "doctor", "-c", config, "--set", "run.storage=/dev/null/runs")
    assert done.returncode == 2, done.stderr
    assert re.search(r"^raybert: storage: [\d.]+ can.t use it: ", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr
    done = call(head, "doctor", "-c", config, "--set", "run.storage=runs")
    assert done.returncode == 2
    assert "run.storage=runs is relative" in done.stderr.splitlines()[-1]


@pytest.mark.ray
def test_a_run_that_would_fail_is_stopped_before_it_trains(head, config):
    more = ("--set", "run.name=tiny-2", "--set", "pretrain.gpu=yes", "-c", config)
    assert call(head, "submit", "corpus", *more).returncode == 0
    done = call(head, "submit", "pretrain", *more)
    assert done.returncode == 2, done.stderr
    assert "pretrain workers: pretrain.workers=1 with pretrain.gpu=yes need 1 GPUs" in done.stderr
    assert "--no-check" in done.stderr
    bold = call(head, "submit", "pretrain", "--no-check", *more)
    assert bold.returncode == 2
    assert "need 1 GPUs" in bold.stderr and "pretrain workers:" not in bold.stderr


@pytest.mark.ray
def test_a_run_that_nobody_submitted(head):
    done = call(head, "logs", "never")
    assert done.returncode == 2
    assert "no job of a run named never" in done.stderr
