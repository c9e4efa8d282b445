"""A Ray head with a token, as `ray start` makes one, for tests that submit to a cluster."""

import os
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

RAYBERT = Path(sys.executable).with_name("raybert")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@dataclass
class Head:
    """A head of a test's own."""

    folder: Path  # of Ray's temporary files, and the home of those who may use it
    address: str  # of the dashboard
    gcs: str  # of the head itself: what drivers connect to
    env: dict  # of those who may

    @property
    def token(self):
        return token_file(self.folder).read_text()


def token_file(home):
    return home / ".ray" / "auth_token"


@contextmanager
def ray_head():
    """Start a head with a token, set up as the documentation says: its file, and nothing else."""
    folder = Path("/tmp") / f"raybert-head-{secrets.token_hex(4)}"  # sockets want a short path
    token = token_file(folder)
    token.parent.mkdir(parents=True)
    token.write_text(secrets.token_hex(16))
    token.chmod(0o600)
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "HOME": str(folder),
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
    raise TimeoutError("the head does not come up")
