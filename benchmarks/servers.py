"""Start and stop the measured servers; their command lines, the model and the texts.

The model is the small classifier of `configs/bench-serve.yaml`, which is trained if it is absent;
the texts are reviews of the sample's test split.
"""

from __future__ import annotations

import json
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

import psutil
from meter import plasma_in_use, private_pss

from raybert.data.sources.settings import EvaluationSource
from raybert.model import huggingface
from raybert.storage.folder import Folder
from raybert.tasks.labelled import read_labelled
from raybert.tasks.single_label import SingleLabel

ROOT = Path(__file__).resolve().parent.parent
RAYBERT = (sys.executable, "-m", "raybert")
CONFIG = ROOT / "configs" / "bench-serve.yaml"
MADE = ROOT / "runs" / "bench-serve"  # the run of that configuration
START_SECONDS, STOP_SECONDS = 300, 60
REPLICA = "ray::ServeReplica"  # the title that Ray gives a replica's process


def raybert_serve(model: Path | str, port: int, **settings: object) -> list[str]:
    """The command line of `raybert serve` for a model or a registered name, with settings."""
    command = [*RAYBERT, "serve", str(model), "--port", str(port)]
    for key, value in settings.items():
        command += ["--set", f"serve.{key}={value}"]
    return command


def raybert_promote(model: Path, name: str, storage: Path) -> list[str]:
    """The command line that makes a model the current version of a registered name."""
    return [*RAYBERT, "promote", name, "--model", str(model), "--set", f"run.storage={storage}"]


def shipped_client(url: str) -> Callable[[str], Any]:
    """A function that requests a text's scores through raybert's client."""
    from raybert.serve.client import Client

    return Client(url).predict


def hugging_face(model: Path, port: int, threads: int) -> list[str]:
    """The command line of `transformers.pipeline` behind FastAPI, with the model's length."""
    script = ROOT / "benchmarks" / "contenders" / "hf_server.py"
    seq_len = huggingface.read_preprocessing(Folder(model)).get("seq_len", 512)
    command = [sys.executable, str(script), str(model), "--port", str(port)]
    return [*command, "--threads", str(threads), "--max-length", str(seq_len)]


class Server:
    """A server in its own process, as a context manager."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        port: int,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self._command, self._environment = name, command, environment
        self.url = f"http://127.0.0.1:{port}"
        self._log: IO[str] = tempfile.TemporaryFile("w+", prefix=f"{name}-")  # noqa: SIM115

    def __enter__(self) -> Self:
        say(" ".join(self._command))
        self._process = subprocess.Popen(
            self._command,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=self._environment,
        )
        try:
            self.wait_until_ready(START_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *rest: object) -> None:
        family = self.processes()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            say(f"{self.name} does not stop; killing it")
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._log.close()

    def wait_until_ready(self, seconds: float) -> None:
        """Wait until its readiness check succeeds.

        Raises:
            SystemExit: it ends, or is not ready in time.
        """
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            if self._process.poll() is not None:
                raise SystemExit(f"{self.name} has ended:\n{self.tail()}")
            try:
                self.get("/health/ready")
                return
            except (OSError, ValueError):  # not listening yet, or not ready
                time.sleep(0.1)
        raise SystemExit(f"{self.name} is not ready after {seconds:.0f} s\n{self.tail()}")

    def tail(self) -> str:
        """The last lines of its output."""
        return "".join(self.printed().splitlines(keepends=True)[-15:])

    def printed(self) -> str:
        """Its output."""
        self._log.seek(0)
        return self._log.read()

    def get(self, path: str) -> Any:
        """GET a path; return the parsed JSON body, None if it is empty.

        Raises:
            OSError: no response, or an error status.
            ValueError: it is not JSON.
        """
        body = self.text(path)
        return json.loads(body) if body else None

    def text(self, path: str) -> str:
        """GET a path; return the body as text.

        Raises:
            OSError: no response, or an error status.
        """
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return str(response.read(), "utf-8")

    def ask(self, texts: str | list[str], key: str | None = None) -> Any:
        """POST texts to /predict, with an API key if given; return the parsed response."""
        body = json.dumps({"inputs": texts, "truncate": True}).encode()
        headers = {"Content-Type": "application/json"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/predict", body, headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.loads(response.read())

    def processes(self) -> list[psutil.Process]:
        """The server's process and its descendants."""
        try:
            me = psutil.Process(self._process.pid)
            return [me, *me.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def replicas(self) -> list[psutil.Process]:
        """Its replicas' processes."""
        found = []
        for process in self.processes():
            try:
                if " ".join(process.cmdline()).startswith(REPLICA):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def ray_address(self) -> str:
        """The address of the Ray that it started.

        Raises:
            SystemExit: it started none.
        """
        for process in self.processes():
            with suppress(psutil.Error):
                for part in process.cmdline():
                    if part.startswith("--gcs-address="):
                        return part.partition("=")[2]
        raise SystemExit(f"{self.name} runs no Ray")

    def answering(self, requests: int) -> set[str]:
        """The replicas that answer some of `requests` requests, by the names in their metrics."""
        found = set()
        for _ in range(requests):
            with suppress(OSError):  # its replica has just been killed
                found.update(re.findall(r'replica="([^"]+)"', self.text("/metrics")))
        return found

    def memory(self) -> int:
        """The PSS of all its processes without shared memory, plus the object store, in bytes."""
        family = self.processes()
        return sum(private_pss(p.pid) for p in family) + (plasma_in_use(family[0]) if family else 0)

    def cores_used(self, seconds: float = 5) -> float:
        """The mean number of busy cores over some seconds."""
        before = self._cpu_seconds()
        time.sleep(seconds)
        return round((self._cpu_seconds() - before) / seconds, 3)

    def _cpu_seconds(self) -> float:
        spent = 0.0
        for process in self.processes():
            try:
                times = process.cpu_times()
                spent += times.user + times.system
            except psutil.Error:
                continue
        return spent


def free_port() -> int:
    """A free port outside of the range from which the system assigns ports."""
    while True:
        port = random.SystemRandom().randrange(10_000, 20_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def small_classifier(given: Path | None) -> Path:
    """The given model directory, or that of the small classifier, trained if it is absent.

    Raises:
        SystemExit: training fails.
    """
    if given is not None:
        return given.resolve()
    command = [*RAYBERT, "run", "--config", str(CONFIG), "--json"]
    say(" ".join(command))  # a finished run does nothing
    if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode:
        raise SystemExit(f"{CONFIG.name} failed; pass a classifier with --model")
    return MADE / "finetune" / "model"


def reviews(model: Path, count: int) -> tuple[list[str], list[str]]:
    """Draw held-out reviews; return the texts and their labels."""
    names = huggingface.read_label_names(Folder(model))
    found = read_labelled(EvaluationSource(path="sample:imdb"), SingleLabel, names)
    texts, labels = found.texts.to_pylist(), found.labels.to_pylist()
    rows = random.Random(0).sample(range(len(texts)), min(count, len(texts)))
    return [texts[row] for row in rows], [labels[row] for row in rows]


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
