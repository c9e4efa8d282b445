"""Submitting to a cluster: a real head with a token, real jobs, real refusals."""

import asyncio
import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import refused
from head import RAYBERT, ray_head, token_file
from making import MODEL, make_corpus, reviews, write_csv

from raybert.cluster import session, token
from raybert.cluster.internals.train import controller_environment
from raybert.config import Settings, build
from raybert.data.corpus.settings import CorpusConfig
from raybert.errors import ConfigError, RaybertError, StorageError, UserError
from raybert.experiment import Experiment
from raybert.jobs import package, ray_jobs
from raybert.jobs.doctor.run_checks import CHECK
from raybert.jobs.submit import _ENVIRONMENT, check, check_storage, submit
from raybert.storage.folder import Folder
from raybert.terminal.display import FOLLOWED, Display

# Without a cluster -------------------------------------------------------------------------------


def test_a_package_is_code_and_configuration(tmp_path):
    size = package.write_package(tmp_path, Settings())
    files = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert {"experiment.yaml", "raybert/cli/commands.py", "raybert/demo.yaml"} <= files
    assert not [name for name in files if "__pycache__" in name]
    assert 100_000 < size < 2_000_000


def test_a_package_has_the_files_of_the_repository_and_no_others(tmp_path, monkeypatch):
    """Keys that somebody keeps beside the code stay on this machine."""
    source = tmp_path / "raybert"
    shutil.copytree(Path(package.__file__).parents[1], source)
    for name in (".env", ".netrc", "jobs/.env.local", "id_rsa", "jobs/key.pem", "notes.txt"):
        (source / name).write_text("AWS_SECRET_ACCESS_KEY=secret")
    (source / ".git").mkdir()
    (source / ".git" / "config.py").write_text("secret")
    monkeypatch.setattr(package, "__file__", str(source / "jobs" / "package.py"))
    package.write_package(tmp_path / "sent", Settings())
    sent = {str(path.relative_to(tmp_path / "sent")) for path in (tmp_path / "sent").rglob("*.*")
            if path.is_file()}  # fmt: skip
    listed = subprocess.run(["git", "ls-files", "raybert"], capture_output=True, text=True,
                            cwd=Path(__file__).parents[2], check=True).stdout.split()  # fmt: skip
    assert sent >= {name for name in listed if Path(name).exists()}
    for path in (tmp_path / "sent").rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes()[:40]


def test_a_large_file_is_named_and_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(package, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match=r"^the package has .* MB: .*/raybert/.*\.py has"):
        package.write_package(tmp_path, Settings())


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
            "pretrain",
            {"run": {"storage": "/runs"}, "pretrain": {"branch_from": "runs/base@5"}},
            "pretrain.branch_from: runs/base@5 is relative",
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
def test_paths_that_only_this_machine_reads_are_refused(command, values, words):
    with pytest.raises(ConfigError, match=f"^{words}"):
        check(Experiment.model_validate(values), command)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("predict -- -m /m -i /a.csv -o out.jsonl", "predict --output out.jsonl: a job has a"),
        ("predict -- -m /m --input=a.csv -o s3://b/o.jsonl", "predict --input a.csv: a job has a"),
        ("predict -- -m runs/mine -i /a.csv -o /out.jsonl", "predict --model runs/mine: a job has"),
        ("evaluate -- -m ~/mine", "evaluate --model ~/mine: a job has a folder of its own"),
    ],
)
def test_a_relative_path_in_the_arguments_of_a_job_is_refused(raybert, words, said):
    """Before anybody is asked: nothing answers at this address."""
    at = ("--set", "run.storage=/runs", "--address", "http://127.0.0.1:1")
    command, *rest = words.split()
    message = refused(raybert("submit", command, *at, *rest))
    assert message.startswith(said) and message.endswith("an absolute path, or a URI")


SECRET = "s3://AKIAEXAMPLE:5EcReT@bucket/x"


@pytest.mark.parametrize(
    "words",
    [
        f"predict -- -m /m -i {SECRET} -o /o.jsonl",
        f"predict -- -m /m -i /a.csv --output={SECRET}.jsonl",
        f"predict -- -m {SECRET} -i /a.csv -o /o.jsonl",
        f"finetune -- --set finetune.source.path=[/a.csv,{SECRET}]",
        f"corpus -- --data {SECRET}",
        f"corpus --data {SECRET}",
        f"corpus --set corpus.source.path={SECRET}",
        "predict -- -m /m -i s3://b/x?secret_key=5EcReT -o /o.jsonl",
    ],
)
def test_credentials_in_a_job_are_refused_and_not_shown(raybert, words):
    """Everybody who can list jobs sees its command, its settings and its metadata."""
    at = ("--set", "run.storage=/runs", "--address", "http://127.0.0.1:1")
    command, *rest = words.split()
    message = refused(raybert("submit", command, *at, *rest))
    assert "s3://... holds a key or a password" in message
    assert "5EcReT" not in message
    with pytest.raises(UserError, match="holds a key"):
        cluster_of(Client()).submit("predict", "x", Settings(), [SECRET])


def test_arguments_of_a_job_are_parsed_as_by_its_command(raybert):
    at = ("--set", "run.storage=/runs", "--address", "http://127.0.0.1:1")
    fine = raybert("submit", "predict", *at, "--", "-m", "/m", "-i", "/a.csv", "-o", "/o.jsonl")
    assert "nobody answers" in refused(fine)
    wrong = raybert("submit", "predict", *at, "--", "--modle", "/m")
    assert wrong.code == 2
    assert "No such option" in wrong.err and "nobody answers" not in wrong.err


def test_a_relative_storage_is_refused():
    with pytest.raises(ConfigError, match="^run.storage=runs is relative: each node would have"):
        check_storage(Experiment.model_validate({"run": {"storage": "runs"}}))


def test_paths_that_all_nodes_read_may_be_submitted():
    values = {
        "run": {"storage": "s3://bucket/runs"},
        "corpus": {"source": {"path": ["/data/a.csv", "gs://b/c.parquet"]}},
        "finetune": {"source": {"path": "sample:imdb"}},
    }
    for command in ("corpus", "pretrain", "finetune", "evaluate", "tune", "run"):
        check(Experiment.model_validate(values), command)


def test_an_address_without_a_listener_is_refused():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(UserError, match=rf"^--address 127.0.0.1:{port}: nobody answers"):
        ray_jobs.Cluster(f"127.0.0.1:{port}")
    with pytest.raises(UserError, match=rf"http://127.0.0.1:{port}/ray: nobody answers"):
        ray_jobs.Cluster(f"http://127.0.0.1:{port}/ray")


@contextlib.contextmanager
def listener(answer):
    """A server that accepts connections and answers each with some bytes, or never."""
    stopped = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        open_ones = []

        def serve():
            while not stopped.is_set():
                with contextlib.suppress(TimeoutError):
                    open_ones.append(server.accept()[0])
                    if answer:
                        open_ones[-1].sendall(answer)
                        open_ones.pop().close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            stopped.set()
            thread.join()
            for connection in open_ones:
                connection.close()


@pytest.mark.parametrize(
    "answer", [b"", b"\x00\x00\x06\x04\x00\x00\x00\x00\x00"], ids=["silent", "gRPC"]
)
def test_an_address_that_does_not_answer_as_a_dashboard_is_refused(answer, monkeypatch):
    """Ray's own client waits for minutes."""
    monkeypatch.setattr(ray_jobs, "_ANSWER_SECONDS", 0.2)
    with listener(answer) as port, pytest.raises(UserError) as refusal:
        ray_jobs.Cluster(f"http://127.0.0.1:{port}")
    assert str(refusal.value).startswith(f"--address http://127.0.0.1:{port}: something listens")


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["silent", "HTTP"]
)
def test_a_ray_address_that_does_not_answer_as_a_head_is_refused(answer, monkeypatch):
    monkeypatch.setattr(token, "_CALL_SECONDS", 0.5)
    with listener(answer) as port:
        address = f"127.0.0.1:{port}"
        assert token.state_of_head(address) == "silent"
        with pytest.raises(UserError, match=f"^{address}: something listens there"):
            session._connect(session.RayConfig(address=address), address)


def test_a_job_runs_with_a_python_that_has_ray(tmp_path):
    """`python` on the PATH of the head is another one."""
    package.write_package(tmp_path, Settings())
    other = tmp_path / "bin"
    other.mkdir()
    for name in ("python", "python3"):
        (other / name).write_text("#!/bin/sh\necho the wrong one; exit 1\n")
        (other / name).chmod(0o755)
    command = ["sh", package.ENTRYPOINT, "version", "--json"]
    env = {"PATH": f"{other}:/usr/bin:/bin", "HOME": str(tmp_path)}
    # A process of Ray has its library loaded, and starts the job by a shell.
    code = "import ctypes, os, subprocess, sys, importlib.util as u\n" \
           "ctypes.CDLL(u.find_spec('ray').submodule_search_locations[0] + '/_raylet.so')\n" \
           "sys.exit(subprocess.run(' '.join(sys.argv[1:]), shell=True).returncode)"  # fmt: skip
    by_ray = subprocess.run([sys.executable, "-c", code, *command], env=env, cwd=tmp_path,
                            capture_output=True, text=True)  # fmt: skip
    assert by_ray.returncode == 0, by_ray.stderr
    assert "ray" in json.loads(by_ray.stdout)
    # Without such a parent: that of the inner shell ends before it looks.
    alone = f"(sleep 0.2; {' '.join(command)} 2>error; echo $? >code.new; mv code.new code) &"
    subprocess.run(["sh", "-c", alone], env=env, cwd=tmp_path, check=True)
    ends = time.monotonic() + 60
    while not (tmp_path / "code").exists():
        assert time.monotonic() < ends
        time.sleep(0.02)
    assert (tmp_path / "code").read_text() == "2\n"
    error = (tmp_path / "error").read_text()
    assert error.startswith("raybert: no python on the cluster's head can import ray")


@pytest.mark.parametrize(
    "address", ["ray://head:10001", "http://[::1", "http://head:port", "http://:8265", "fe80::1"]
)
def test_a_malformed_address_is_refused(address):
    with pytest.raises(UserError, match=r"^--address .*: expected http://HEAD:8265, the dashboard"):
        ray_jobs.Cluster(address)


@pytest.mark.parametrize(
    ("address", "asked", "taken"),
    [
        ("head", ("head", 8265), "http://head:8265"),
        ("head:80/", ("head", 80), "http://head:80"),
        ("http://[::1]:8265", ("::1", 8265), "http://[::1]:8265"),
        ("https://proxy/ray/", ("proxy", 443), "https://proxy:443/ray"),
        ("http://proxy/ray", ("proxy", 80), "http://proxy:80/ray"),
        ("https://proxy:8443/a/b", ("proxy", 8443), "https://proxy:8443/a/b"),
    ],
)
def test_an_address_keeps_its_brackets_and_its_path(monkeypatch, address, asked, taken):
    where = []

    class Connection(socket.socket):
        def __init__(self, place, timeout):
            super().__init__()
            where.append(place)

    monkeypatch.setattr(ray_jobs.socket, "create_connection", Connection)
    assert ray_jobs._check_address(address) == taken
    assert where == [asked]


class Client:
    """Ray's client of a head that has these jobs; what is submitted runs at once."""

    def __init__(self, **alive):
        self.infos = {}
        for identity, status in alive.items():
            self._add(identity.replace("_", "-"), {}, status)

    def _add(self, identity, metadata, status="RUNNING"):
        self.infos[identity] = SimpleNamespace(
            submission_id=identity, metadata=metadata, status=status,
            start_time=1000 * len(self.infos), end_time=None, message=None,
        )  # fmt: skip

    def list_jobs(self):
        return list(self.infos.values())

    def get_job_info(self, identity):
        return self.infos[identity]

    def submit_job(self, *, entrypoint, submission_id, runtime_env, metadata):
        self._add(submission_id, metadata)
        self.sent = SimpleNamespace(entrypoint=entrypoint, **runtime_env)


def cluster_of(client):
    cluster = ray_jobs.Cluster.__new__(ray_jobs.Cluster)
    cluster.address, cluster._client = "http://head:8265", client
    cluster.resources = lambda: {"CPU": 4.0}
    return cluster


def mine(**sections):
    return build(Experiment, {"run": {"name": "x", "storage": "/nonexistent"}, **sections}, "test")


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        ("run", "pretrain", "pretrain"),
        ("pretrain", "run", "pretrain"),
        ("run", "corpus", "corpus"),
        ("pretrain", "finetune", None),
        ("run", "predict", None),
        ("doctor", "run", None),
    ],
)
def test_two_commands_never_write_the_same_stage(first, second, both):
    cluster = cluster_of(Client(**{f"raybert_x_{first}_1": "RUNNING"}))
    if both is None:
        assert cluster.submit(second, "x", mine()).job.id == f"raybert-x-{second}-1"
        return
    with pytest.raises(UserError) as refusal:
        cluster.submit(second, "x", mine())
    assert str(refusal.value) == (
        f"raybert-x-{first}-1 is writing {both} of x; wait for it, or stop it with `raybert stop "
        f"raybert-x-{first}-1 --address http://head:8265`, and submit {second} again"
    )
    assert cluster.submit(second, "y", mine()).job.run == "y"  # another run's are its own
    cluster._client.infos[f"raybert-x-{first}-1"].status = "STOPPED"
    assert cluster.submit(second, "x", mine()).job.is_alive


def test_following_a_job_with_other_settings_shows_the_difference(capsys):
    cluster, display = cluster_of(Client()), Display()
    first = submit(cluster, "pretrain", mine(pretrain={"lr": 0.01}), [], display)
    assert "warning" not in capsys.readouterr().err
    assert submit(cluster, "pretrain", mine(pretrain={"lr": 0.01}), [], display) == first
    assert "warning" not in capsys.readouterr().err
    assert submit(cluster, "pretrain", mine(model={"num_layers": 3}), [], display) == first
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "raybert-x-pretrain-1 is already active: following it"
    layers = Experiment().model.num_layers
    assert f"model.num_layers: {layers} -> 3" in said[1] and "pretrain.lr: 0.01 -> " in said[1]
    assert "yours are not applied: `raybert stop raybert-x-pretrain-1 --address " in said[1]


def test_a_job_without_stored_settings_is_followed(capsys):
    cluster = cluster_of(Client(raybert_x_pretrain_7="PENDING"))
    assert submit(cluster, "pretrain", mine(), [], Display()).id == "raybert-x-pretrain-7"
    assert "warning" not in capsys.readouterr().err


def test_predictions_for_other_texts_are_a_separate_job():
    cluster, texts = cluster_of(Client()), [["-i", "/a.csv"], ["-i", "/b.csv"]]
    made = [cluster.submit("predict", "x", mine(), words) for words in [*texts, *texts]]
    assert [one.job.id for one in made] == 2 * ["raybert-x-predict-1", "raybert-x-predict-2"]
    assert [one.package is None for one in made] == [False, False, True, True]


def test_a_job_of_checks_is_not_the_latest_job_of_its_run():
    cluster = cluster_of(Client(raybert_x_pretrain_1="STOPPED", raybert_x_doctor_1="RUNNING"))
    assert cluster.latest("x").id == "raybert-x-pretrain-1"
    assert cluster.latest("raybert-x-doctor-1").command == "doctor"


@pytest.mark.parametrize("checks", [True, False])
def test_the_checks_of_a_job_are_requested_by_its_environment(checks):
    cluster = cluster_of(Client())
    submit(cluster, "pretrain", mine(), [], Display(quiet=True), checks=checks)
    assert (CHECK in cluster._client.sent.env_vars) == checks
    assert "-c experiment.yaml --json" in cluster._client.sent.entrypoint
    submit(cluster, "corpus", mine(), [], Display(quiet=True), checks=checks)
    assert CHECK not in cluster._client.sent.env_vars


def test_a_job_has_the_variables_that_training_would_set_too_late():
    name = "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S"
    assert _ENVIRONMENT[name] == controller_environment(60, is_elastic=False)[name]


# A job that is followed --------------------------------------------------------------------------


class Log(Client):
    """A job that prints `text`; each connection tells it from the beginning and breaks its own way.

    `ways`: (characters that come, then what happens: "hangs", "breaks" or "ends").
    """

    def __init__(self, text, *ways, ends_at=1):
        super().__init__(raybert_x_pretrain_1="RUNNING")
        self.text, self.ways, self.ends_at = text, list(ways), ends_at
        self.asked = 0

    def get_job_info(self, identity):
        self.asked += 1
        if len(self.ways) < self.ends_at:
            self.infos[identity].status = "SUCCEEDED"
        return super().get_job_info(identity)

    async def tail_job_logs(self, identity):
        count, end = self.ways.pop(0)
        for at in range(0, count, 5):
            yield self.text[at : min(at + 5, count)]
        if end == "hangs":
            await asyncio.Event().wait()
        if end == "breaks":
            raise RuntimeError("WebSocket connection closed unexpectedly")


@pytest.fixture
def hurry(monkeypatch):
    monkeypatch.setattr(ray_jobs, "_STREAM_TIMEOUT_S", 0.1)
    monkeypatch.setattr(ray_jobs, "_RETRY_SECONDS", 0.0)


TEXT = "first\nsecond line\nthird\n\nlast, without an end"


@pytest.mark.parametrize("how", ["hangs", "breaks", "ends"])
def test_a_lost_connection_neither_loses_nor_repeats_a_line(hurry, how):
    whole = len(TEXT)
    log = Log(TEXT, (0, how), (9, how), (whole - 4, how), (9, how), (whole, "ends"))
    cluster = cluster_of(log)
    job = cluster.job("raybert-x-pretrain-1")
    assert list(cluster.follow(job)) == TEXT.split("\n")
    assert log.ways == []


def test_a_job_that_ends_while_disconnected_is_read_to_its_end(hurry):
    cluster = cluster_of(Log(TEXT, (9, "hangs"), (len(TEXT), "ends"), ends_at=2))
    assert list(cluster.follow(cluster.job("raybert-x-pretrain-1"))) == TEXT.split("\n")


def test_a_silent_job_does_not_count_as_a_silent_cluster(hurry, monkeypatch):
    """It prints nothing for longer than a head may be away, and then a connection breaks."""
    monkeypatch.setattr(ray_jobs, "_HEAD_TIMEOUT_S", 0.15)
    log = Log("done\n", *4 * [(0, "hangs")], (0, "breaks"), (5, "ends"))
    cluster = cluster_of(log)
    assert list(cluster.follow(cluster.job("raybert-x-pretrain-1"))) == ["done"]


def test_a_cluster_that_stops_answering_is_an_error(hurry, monkeypatch):
    monkeypatch.setattr(ray_jobs, "_HEAD_TIMEOUT_S", 0.15)
    cluster = cluster_of(Log("", *4 * [(0, "hangs")]))
    job = cluster.job("raybert-x-pretrain-1")

    def gone(identity):
        raise ConnectionError("")

    monkeypatch.setattr(cluster._client, "get_job_info", gone)
    with pytest.raises(StorageError, match="has stopped answering: .*answer: ConnectionError$"):
        list(cluster.follow(job))


def test_a_job_unknown_to_a_new_head_is_an_error_at_once(hurry):
    log = Log(TEXT, (9, "breaks"))
    cluster = cluster_of(log)
    job, lines = cluster.job("raybert-x-pretrain-1"), []

    def unknown(identity):
        raise RuntimeError("Request failed with status code 404: no such job")

    with pytest.raises(
        RaybertError, match="does not know raybert-x-pretrain-1 any more.*submit it again"
    ):
        for line in cluster.follow(job):
            lines.append(line)
            log.infos.clear()
            log.get_job_info = unknown
    assert lines == ["first"]


def test_progress_of_a_followed_job_rewrites_one_line(capsys, monkeypatch):
    monkeypatch.setenv(FOLLOWED, "1")
    far = Display()
    with far.stage("corpus"):
        far.print("said")
    log = capsys.readouterr().err.splitlines()
    monkeypatch.delenv(FOLLOWED)
    near = Display()
    near._live = True
    for line in log:
        near.forward(line)
    shown = capsys.readouterr().err
    assert "starting" in shown and "\r\x1b[2K" in shown
    assert "\x1f" not in shown
    assert shown.endswith("said\n")


# With one ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started():
    with ray_head() as head:
        yield head


@pytest.fixture(scope="module")
def head(started):
    """The address of a head, and the environment of those who may use it."""
    return started.address, started.env


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
    made = build(CorpusConfig, values["corpus"], "test")
    make_corpus(
        Folder(path) / "runs" / "tiny-1" / "corpus",
        texts=[text for text, _ in reviews(160)],
        config=made,
    )
    file = path / "tiny.yaml"
    file.write_text(json.dumps(values))
    return file


@pytest.mark.ray
@pytest.mark.parametrize("more", [{}, {"RAY_AUTH_TOKEN": "wrong" * 8}], ids=["missing", "wrong"])
def test_a_missing_or_wrong_token_is_refused(head, more):
    done = call(head, "jobs", HOME="/nonexistent", **more)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "ray get-auth-token" in done.stderr.splitlines()[-1]
    assert ("refuses your token" in done.stderr) == bool(more)


@pytest.mark.ray
@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "HOME"])
def test_a_token_is_sent_wherever_ray_would_find_it(started, name):
    """With nothing else set: Ray's client sends it only where RAY_AUTH_MODE says so."""
    values = {
        "RAY_AUTH_TOKEN": started.token,
        "RAY_AUTH_TOKEN_PATH": str(token_file(started.folder)),
        "HOME": str(started.folder),
    }
    more = {"HOME": "/nonexistent", name: values[name]}
    done = call((started.address, started.env), "jobs", "--json", **more)
    assert (done.returncode, done.stdout) == (0, '{"jobs": []}\n'), done.stderr


_CONNECT = """
import sys
from raybert.cluster import token as auth
from raybert.cluster.session import RayConfig, ray_session

with ray_session(RayConfig(address=sys.argv[1])) as resources:
    print(auth.is_on(), resources.cpus)
"""


@pytest.mark.ray
def test_a_driver_sends_the_token_of_its_home_directory(started):
    """Ray itself reads that file only where RAY_AUTH_MODE says so."""
    done = subprocess.run(
        [sys.executable, "-c", _CONNECT, started.gcs],
        env=started.env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["True", "4.0"], done.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_a_corpus_is_made_by_a_job(head, config):
    done = call(head, "submit", "corpus", "-c", config, "-n", "made", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    ended = json.loads(done.stdout.splitlines()[-1])
    assert (ended["status"], ended["exit_code"]) == ("SUCCEEDED", 0)
    assert (ended["run"], ended["command"]) == ("made", "corpus")
    assert ended["result"]["rows"]["train"] > 50
    assert (config.parent / "runs/made/corpus/manifest.json").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_has_one_job_which_can_be_followed_and_stopped(head, config):
    first = call(head, "submit", "pretrain", "-c", config, "--no-wait", "--json")
    assert first.returncode == 0, first.stderr
    job = json.loads(first.stdout)["id"]
    told = [line for line in first.stderr.splitlines() if "starting" not in line]
    assert "parameters; at most 4 checkpoints of " in told[0]
    assert "100,000 steps" in told[1] and "assumed 50 GFLOP/s on a core" in told[1]
    assert f"submitted {job} to " in told[2] and ", package " in told[2]
    other = ("--set", "pretrain.lr=0.5")
    second = call(head, "submit", "pretrain", "-c", config, "--no-wait", "--json", *other)
    assert json.loads(second.stdout)["id"] == job
    assert "is already active" in second.stderr
    assert "(pretrain.lr: 0.001 -> 0.5); yours are not applied" in second.stderr
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
        assert follower.wait(30) == 130, lines
    assert any("detached" in line for line in lines)
    assert any("no problem in 9 checks" in line for line in lines)

    stopped = call(head, "stop", "tiny-1", "--json")
    assert json.loads(stopped.stdout) == {"job": job, "stopped": True}
    ended = call(head, "logs", "tiny-1")  # follows it to its end, or shows it after that
    assert "again to resume" in ended.stdout + ended.stderr
    listed = json.loads(call(head, "jobs", "--json").stdout)["jobs"]
    assert [one["status"] for one in listed if one["id"] == job] == ["STOPPED"]
    checkpoints = config.parent / "runs/tiny-1/pretrain/checkpoints"
    assert list(checkpoints.glob("step-*.json")), "stopped without a checkpoint"


@pytest.mark.ray
@pytest.mark.slow
def test_a_problem_found_by_the_doctor_is_the_last_line_and_exits_with_2(head, config):
    done = call(head, "doctor", "-c", config, "--set", "run.storage=/dev/null/runs", "--json")
    assert done.returncode == 2, done.stderr
    assert re.search(r"^raybert: storage: [\d.]+ can.t use it: ", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr
    found = {one["name"]: one for one in json.loads(done.stdout)["findings"]}
    assert found.pop("storage")["status"] == "problem"
    found.pop("memory")  # /dev/shm is small in some containers
    assert {one["status"] for one in found.values()} == {"ok"}, found
    assert found["token"]["message"].startswith("on")
    assert re.search(r"all-reduce +2 processes on \d nodes? took [\d.]+ s", done.stderr)


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_that_would_fail_is_stopped_before_it_trains(head, config):
    """And ends with the job's line and exit code."""
    shutil.copytree(config.parent / "runs/tiny-1/corpus", config.parent / "runs/tiny-2/corpus")
    done = call(head, "submit", "pretrain", "-c", config, "-n", "tiny-2", "--set",
                "pretrain.gpu=yes")  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "pretrain workers: pretrain.workers=1 with pretrain.gpu=yes need 1 GPUs" in done.stderr
    assert "--no-check" in done.stderr


@pytest.mark.ray
def test_logs_of_an_unknown_run_are_refused(head):
    done = call(head, "logs", "never")
    assert done.returncode == 2
    assert "no job of a run named never" in done.stderr
