"""A cluster of several nodes on one machine, in network namespaces.

Each node has an address on a bridge and its own `ray start`, with Ray's token authentication. A
supervisor restarts nodes that died, as Kubernetes restarts pods. Needs Linux and root.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

_DASHBOARD, _GCS = 8265, 6379
_BIN = Path(sys.executable).parent
_START_SECONDS = 120


def refusal() -> str | None:
    """The reason for which this machine can't run such a cluster; None if it can."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root: run it with sudo"
    if shutil.which("ip") is None:
        return "`ip` is missing: install iproute2"
    return None


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout.strip()


@dataclass(frozen=True)
class Network:
    """The names and addresses of a cluster, distinct from those of a cluster that runs already."""

    tag: str  # in the names of its interfaces and namespaces
    number: int  # third byte of its addresses

    @classmethod
    def draw(cls) -> Network:
        """Draw names and addresses; collisions are unlikely."""
        return cls(secrets.token_hex(2), 1 + secrets.randbelow(250))

    @property
    def bridge(self) -> str:
        """The interface that joins the nodes."""
        return f"rb{self.tag}"

    def address(self, host: int) -> str:
        """The address of a host on the bridge."""
        return f"10.77.{self.number}.{host}"


@dataclass
class Node:
    """A network namespace and the `ray start` in it."""

    network: Network
    index: int  # 0 is the head
    folder: Path
    cpus: int
    env: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    wanted: bool = True  # whether the supervisor restarts it
    starts: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def name(self) -> str:
        """The namespace's name."""
        return f"{self.network.bridge}-{self.index}"

    @property
    def address(self) -> str:
        """The node's address on the bridge."""
        return self.network.address(self.index + 1)

    @property
    def link(self) -> str:
        """The interface at the bridge's end of its link."""
        return f"{self.name}o"

    def connect(self) -> None:
        """Create the namespace and its link to the bridge."""
        inside, outside = f"{self.name}i", self.link
        _ip("netns", "add", self.name)
        _ip("link", "add", outside, "type", "veth", "peer", "name", inside)
        _ip("link", "set", inside, "netns", self.name)
        _ip("link", "set", outside, "master", self.network.bridge, "up")
        for words in (
            ("addr", "add", f"{self.address}/24", "dev", inside),
            ("link", "set", inside, "up"),
            ("link", "set", "lo", "up"),
        ):
            _ip("-n", self.name, *words)

    def start(self) -> None:
        """Run `ray start` with --block."""
        with self.lock:
            self.folder.mkdir(exist_ok=True)
            words = [
                *("ip", "netns", "exec", self.name, str(_BIN / "ray"), "start", "--block"),
                *(f"--node-ip-address={self.address}", f"--num-cpus={self.cpus}"),
                *(f"--temp-dir={self.folder}", "--object-store-memory=200000000"),
                *("--disable-usage-stats", "--log-style=record"),
            ]
            if self.index == 0:
                words += ["--head", f"--port={_GCS}", f"--dashboard-host={self.address}"]
            else:
                words += [f"--address={self.network.address(1)}:{_GCS}"]
            log = (self.folder / "start.log").open("ab")
            self.process = subprocess.Popen(
                words, env=self.env, stdout=log, stderr=log, start_new_session=True
            )
            self.starts += 1

    def pids(self, word: str = "") -> list[int]:
        """The processes in the namespace with a word in their command line, the oldest first."""
        found = []
        for pid in map(int, _ip("netns", "pids", self.name).split()):
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                if word in " ".join(process.cmdline()):
                    found.append((process.create_time(), pid))
        return [pid for _, pid in sorted(found)]

    def kill(self) -> None:
        """Kill all processes, as at a power failure."""
        with self.lock:
            for pid in self.pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self.process is not None:
                self.process.wait()

    def cut(self) -> None:
        """Disconnect the node from the network."""
        _ip("link", "set", self.link, "down")

    def mend(self) -> None:
        """Connect the node to the network again."""
        _ip("link", "set", self.link, "up")

    def remove(self) -> None:
        """Kill all processes and delete the namespace."""
        self.wanted = False
        with suppress(subprocess.CalledProcessError):
            self.kill()
        for words in (("link", "del", self.link), ("netns", "del", self.name)):
            with suppress(subprocess.CalledProcessError):
                _ip(*words)


class Disk:
    """A shared folder on which writes can be made to fail: a tmpfs that is filled completely."""

    def __init__(self, path: Path, megabytes: int) -> None:
        """Mount it."""
        self.path = path
        path.mkdir()
        options = f"size={megabytes}m,mode=755"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True)
        self._full = threading.Event()
        self._thread: threading.Thread | None = None

    def refuse(self) -> None:
        """Fill the disk, and keep it full when other processes delete files."""
        self._full.set()
        self._fill()
        self._thread = threading.Thread(target=self._keep_full, daemon=True)
        self._thread.start()

    def accept(self) -> None:
        """Free the disk."""
        self._full.clear()
        if self._thread is not None:
            self._thread.join()
        (self.path / ".ballast").unlink(missing_ok=True)

    def _keep_full(self) -> None:
        while self._full.is_set():
            self._fill()
            time.sleep(0.2)

    def _fill(self) -> None:
        size = 16 << 20
        with (self.path / ".ballast").open("ab", buffering=0) as file:
            while size >= 1:
                try:
                    file.write(bytes(size))
                except OSError:
                    size //= 4

    def unmount(self) -> None:
        """Unmount it; its content is lost."""
        self.accept()
        subprocess.run(["umount", "--lazy", str(self.path)], check=False)


class Cluster:
    """A head, workers, a shared disk and the supervisor, as a context manager."""

    def __init__(self, workers: int, *, cpus: int = 2, head_cpus: int = 1, disk_mb: int = 1024):
        """Prepare a cluster; `cpus` are Ray's logical CPUs of each worker node."""
        # Not below TMPDIR: paths of Unix sockets are limited to 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="rb-", dir="/tmp"))
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "PATH": f"{_BIN}:{os.environ['PATH']}",
        }
        self._disk_mb = disk_mb
        self._network = Network.draw()
        self.nodes = [
            Node(self._network, i, self.folder / f"n{i}", cpus if i else head_cpus, self.env)
            for i in range(workers + 1)
        ]
        self._over = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)

    @property
    def head(self) -> Node:
        """The node with the dashboard."""
        return self.nodes[0]

    @property
    def workers(self) -> list[Node]:
        """The nodes without the head."""
        return self.nodes[1:]

    @property
    def address(self) -> str:
        """The dashboard's URL."""
        return f"http://{self.head.address}:{_DASHBOARD}"

    def __enter__(self) -> Cluster:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that __exit__ runs
        try:
            self.disk = Disk(self.folder / "disk", self._disk_mb)
            _ip("link", "add", self._network.bridge, "type", "bridge")
            _ip("addr", "add", f"{self._network.address(254)}/24", "dev", self._network.bridge)
            _ip("link", "set", self._network.bridge, "up")
            for node in self.nodes:
                node.connect()
            self.head.start()
            self.wait_for_head()
            for node in self.workers:
                if node.wanted:
                    node.start()
            self._supervisor.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._supervisor.is_alive():
            self._supervisor.join()
        for node in reversed(self.nodes):
            node.remove()
        with suppress(subprocess.CalledProcessError):
            _ip("link", "del", self._network.bridge)
        if hasattr(self, "disk"):
            self.disk.unmount()
        shutil.rmtree(self.folder, ignore_errors=True)

    def wait_for_head(self) -> None:
        """Wait until the head accepts jobs.

        Raises:
            RuntimeError: a timeout.
        """
        ends = time.monotonic() + _START_SECONDS
        while self.call("jobs").returncode != 0:
            if time.monotonic() > ends:
                log = (self.head.folder / "start.log").read_text(errors="replace")
                raise RuntimeError(f"the head does not start: {log[-2000:]}")
            time.sleep(1)

    def alive(self) -> dict[str, str]:
        """The addresses of the nodes that are alive according to Ray, and their IDs."""
        listing = self._ray("list", "nodes", "--address", self.address, "--format", "json")
        return {
            found["node_ip"]: found["node_id"]
            for found in json.loads(listing)
            if found["state"] == "ALIVE"
        }

    def wait_for_nodes(self, count: int) -> None:
        """Wait until exactly `count` nodes are alive, the head included.

        Raises:
            RuntimeError: a timeout.
        """
        ends = time.monotonic() + _START_SECONDS
        while len(alive := self.alive()) != count:
            if time.monotonic() > ends:
                raise RuntimeError(f"{len(alive)} nodes instead of {count}: {sorted(alive)}")
            time.sleep(1)

    def drain(self, node: Node, seconds: int) -> None:
        """Preempt a node as a cloud does: drain it, and kill it after the notice.

        Raises:
            RuntimeError: Ray rejects the drain request.
        """
        self._ray(
            *(
                "drain-node",
                "--address",
                f"{self.head.address}:{_GCS}",
                "--node-id",
                self.alive()[node.address],
            ),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken away"),
            *("--deadline-remaining-seconds", str(seconds)),
        )
        time.sleep(seconds)
        node.kill()

    def _ray(self, *words: str) -> str:
        done = subprocess.run(
            [str(_BIN / "ray"), *words], env=self.env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"ray {words[0]}: {done.stderr[-500:]}")
        return done.stdout

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `raybert` outside of the cluster and wait for it."""
        return subprocess.run(
            self._command(words), env=self.env, capture_output=True, text=True, check=False
        )

    def begin(self, *words: str, **more: Any) -> subprocess.Popen[str]:
        """Start `raybert` outside of the cluster."""
        return subprocess.Popen(self._command(words), env=self.env, text=True, **more)

    def _command(self, words: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-m", "raybert", *words, "--address", self.address]

    def _supervise(self) -> None:
        while not self._over.wait(1):
            for node in self.nodes:
                with node.lock:
                    process = node.process
                    if not node.wanted or process is None or process.poll() is None:
                        continue
                    node.kill()  # all processes of a container end with it
                    node.start()
