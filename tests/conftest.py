"""Shared fixtures."""

import fcntl
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import uuid

import pytest
import torch
from commands import run_here
from examples import examples
from hypothesis import HealthCheck, settings
from making import finetune_job, make_corpus, pretrain_job, reviews
from proxy import Proxy, s3_uri

from raybert.cluster.session import RayConfig
from raybert.cluster.session import ray_session as session
from raybert.storage.folder import Folder
from raybert.train.run import train_in_process

# Time decides no test: other work on the machine makes any example slow.
settings.register_profile(
    "any",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=examples(40),
)
settings.load_profile("any")

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "a-key-for-tests",
    "AWS_SECRET_ACCESS_KEY": "a-secret-for-tests",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}
_S3 = """
import sys
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("{}:{}".format(*server.get_host_and_port()), flush=True)
sys.stdin.read()  # ends with the tests
server.stop()
"""


def pytest_collection_modifyitems(items):
    """Run first the files that take longest, so that no process is left alone with one at the end.

    `make test` gives each process whole files: a module's fixtures are then made once.
    """
    longest = ("test_distributed", "test_s3", "test_commands", "test_internals", "test_page")
    items.sort(key=lambda item: not item.path.stem.startswith(longest))


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c():
    """Restore Ctrl-C, which shells disable for background processes and tests send."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def credentials():
    """Credentials of S3 in the environment, which Ray's processes inherit."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        yield CREDENTIALS


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Make a folder in the first of pytest-xdist's processes that wants it; each gets a copy."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def get(name, make):
        torch.set_num_threads(1)
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (shared / name).exists():
                make(Folder(own / f"{name}-made"))
                (own / f"{name}-made").rename(shared / name)
        return Folder(shutil.copytree(shared / name, own / f"{name}-copy"))

    return get


@pytest.fixture(scope="session")
def model(made_once):
    """A classifier of good and bad reviews; its input length is 32 tokens."""

    def make(folder):
        job = finetune_job(folder, rows=reviews(200), steps=None, epochs=5, lr=1e-2)
        train_in_process(job, folder / "run", on_progress=lambda record: None)

    return made_once("classifier", make) / "run" / "model"


@pytest.fixture(scope="session")
def pretrained(made_once):
    """A barely trained masked language model."""

    def make(folder):
        make_corpus(folder / "corpus")
        job = pretrain_job(folder / "corpus", steps=2)
        train_in_process(job, folder / "run", on_progress=lambda record: None)

    return made_once("pretrained", make) / "run" / "model"


@pytest.fixture
def raybert(capsys, monkeypatch):
    """Run the command line in this process."""
    return lambda *arguments, stdin=b"": run_here(arguments, stdin, capsys, monkeypatch)


@pytest.fixture(scope="session")
def ray_session(credentials):
    """One Ray on this machine for all tests that need it."""
    import ray

    with session(RayConfig(object_store_gb=0.5), workers=2):
        yield ray


@pytest.fixture(scope="session")
def s3_server(credentials):
    """The address (host:port) of a local S3 server with a bucket."""
    if importlib.util.find_spec("moto") is None:
        pytest.skip("moto, the S3 server, is not installed")
    with subprocess.Popen(
        [sys.executable, "-c", _S3],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        address = server.stdout.readline().strip()
        assert address, "the server does not start"
        Folder(f"{s3_uri(address, '')}&allow_bucket_creation=true").filesystem.create_dir("tests")
        yield address


@pytest.fixture
def s3_path():
    """A path in the bucket for one test."""
    return uuid.uuid4().hex[:8]


@pytest.fixture
def bucket(s3_server, s3_path):
    """An empty folder on S3."""
    return Folder(s3_uri(s3_server, s3_path))


@pytest.fixture
def proxy(s3_server, s3_path, monkeypatch):
    """The same folder through a connection that can be broken, and that connection."""
    monkeypatch.setattr("raybert.storage.folder._TRIES", 1)  # Arrow's retries would only take time
    with Proxy(s3_server) as proxy:
        yield Folder(s3_uri(proxy.address, s3_path)), proxy


@pytest.fixture(params=["a disk", "S3"])
def anywhere(request, tmp_path):
    """An empty folder on a disk, and one on S3."""
    return Folder(tmp_path) if request.param == "a disk" else request.getfixturevalue("bucket")
