"""The servers that are measured: how each is started, when it is ready, how it ends.

Their command lines stand here and nowhere else, and so does what they are measured with: the small
classifier, made by `configs/bench-serve.yaml` where it is absent, and reviews of the sample's test
split, whose lengths are those of real ones.
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

from raybert.data.sources.labelled import labelled
from raybert.data.sources.settings import EvaluationSource
from raybert.model import huggingface
from raybert.storage.folder import Folder

ROOT = Path(__file__).resolve().parent.parent
RAYBERT = (sys.executable, "-m", "raybert")
CONFIG = ROOT / "configs" / "bench-serve.yaml"
MADE = ROOT / "runs" / "bench-serve"  # by that configuration
START_SECONDS, STOP_SECONDS = 300, 60
REPLICA = "ray::ServeReplica"  # what Ray calls the process of one


def raybert_serve(model: Path | str, port: int, **settings: object) -> list[str]:
    """The command line of `raybert serve`: a model or its name in a registry, `serve` settings."""
    command = [*RAYBERT, "serve", str(model), "--port", str(port)]
    for key, value in settings.items():
        command += ["--set", f"serve.{key}={value}"]
    return command


def raybert_promote(model: Path, name: str, storage: Path) -> list[str]:
    """The command line that makes a model the current one of a name in a registry."""
    return [*RAYBERT, "promote", name, "--model", str(model), "--set", f"run.storage={storage}"]


def shipped_client(url: str) -> Callable[[str], Any]:
    """What asks for the scores of a text through the client that raybert ships."""
    from raybert.serve.client import Client

    return Client(url).predict


def hugging_face(model: Path, port: int, threads: int) -> list[str]:
    """The command line of `transformers.pipeline` behind FastAPI, with the model's own length."""
    script = ROOT / "benchmarks" / "contenders" / "hf_server.py"
    seq_len = huggingface.read_preprocessing(Folder(model)).get("seq_len", 512)
    command = [sys.executable, str(script), str(model), "--port", str(port)]
    return [*command, "--threads", str(threads), "--max-length", str(seq_len)]


class Server:
    """A server in a process of its own, for as long as the context lasts."""

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
            say(f"{self.name} does not end; killing it")
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._log.close()

    def wait_until_ready(self, seconds: float) -> None:
        """Wait until it says that it can answer.

        Raises:
            SystemExit: it ends, or does not say so in time.
        """
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            if self._process.poll() is not None:
                raise SystemExit(f"{self.name} has ended:\n{self.tail()}")
            try:
                self.get("/health/ready")
                return
            except (OSError, ValueError):  # not listening yet, or it says no
                time.sleep(0.1)
        raise SystemExit(f"{self.name} is not ready after {seconds:.0f} s\n{self.tail()}")

    def tail(self) -> str:
        """The last lines that it printed."""
        return "".join(self.printed().splitlines(keepends=True)[-15:])

    def printed(self) -> str:
        """All that it printed."""
        self._log.seek(0)
        return self._log.read()

    def get(self, path: str) -> Any:
        """GET a path; returns the parsed answer, None of an empty one.

        Raises:
            OSError: no answer, or an error.
            ValueError: it is not JSON.
        """
        body = self.text(path)
        return json.loads(body) if body else None

    def text(self, path: str) -> str:
        """GET a path; returns the answer as it is.

        Raises:
            OSError: no answer, or an error.
        """
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return str(response.read(), "utf-8")

    def ask(self, texts: str | list[str], key: str | None = None) -> Any:
        """POST texts to /predict, with a key where one is asked for; returns the parsed answer."""
        body = json.dumps({"inputs": texts, "truncate": True}).encode()
        headers = {"Content-Type": "application/json"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/predict", body, headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.loads(response.read())

    def processes(self) -> list[psutil.Process]:
        """The server and all that it started."""
        try:
            me = psutil.Process(self._process.pid)
            return [me, *me.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def replicas(self) -> list[psutil.Process]:
        """The processes of its replicas."""
        found = []
        for process in self.processes():
            try:
                if " ".join(process.cmdline()).startswith(REPLICA):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def ray_address(self) -> str:
        """Where the Ray that it started listens.

        Raises:
            SystemExit: it has none.
        """
        for process in self.processes():
            with suppress(psutil.Error):
                for part in process.cmdline():
                    if part.startswith("--gcs-address="):
                        return part.partition("=")[2]
        raise SystemExit(f"{self.name} runs no Ray")

    def answering(self, looks: int) -> set[str]:
        """The replicas that answer, by the names in their metrics, at so many looks."""
        found = set()
        for _ in range(looks):
            with suppress(OSError):  # of one that has just been killed
                found.update(re.findall(r'replica="([^"]+)"', self.text("/metrics")))
        return found

    def memory(self) -> int:
        """PSS of all its processes without shared memory, and the object store, in bytes."""
        family = self.processes()
        return sum(private_pss(p.pid) for p in family) + (plasma_in_use(family[0]) if family else 0)

    def cores_used(self, seconds: float = 5) -> float:
        """How many cores it keeps busy over a while."""
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
    """A port that nobody listens on, and that the system hands to nobody else."""
    while True:
        port = random.SystemRandom().randrange(10_000, 20_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def small_classifier(given: Path | None) -> Path:
    """The model directory that is served: the given one, or the small classifier.

    Raises:
        SystemExit: it can't be made.
    """
    if given is not None:
        return given.resolve()
    command = [*RAYBERT, "run", "--config", str(CONFIG), "--json"]
    say(" ".join(command))  # nothing is left to do where it was made before
    if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode:
        raise SystemExit(f"{CONFIG.name} could not be run; name a classifier with --model")
    return MADE / "finetune" / "model"


def reviews(model: Path, count: int) -> tuple[list[str], list[str]]:
    """Draw so many held-out reviews; returns the texts, and the label of each."""
    names = huggingface.read_label_names(Folder(model))
    found = labelled(EvaluationSource(), names=names)
    rows = random.Random(0).sample(range(len(found.labels)), min(count, len(found.labels)))
    texts = found.texts.to_pylist()
    return [texts[row] for row in rows], [names[found.labels[row]] for row in rows]


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
