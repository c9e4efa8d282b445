"""What tests share."""

import io
import json
import signal
import sys

import pytest
import torch

from raybert import cli
from raybert.ray_session import RayConfig
from raybert.ray_session import ray_session as session


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c():
    """A shell makes what it starts in the background deaf to Ctrl-C, which tests press."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def ray_session():
    """One Ray on this machine for all tests that need it."""
    import ray

    with session(RayConfig(object_store_gb=0.5), workers=2):
        yield ray


class Result:
    """What a command of the command line came to."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    @property
    def json(self):
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def raybert(capsys, monkeypatch):
    """Run the command line in this process."""

    def run(*arguments, stdin=b""):
        torch.set_num_threads(1)
        monkeypatch.setattr(sys, "argv", ["raybert", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return Result(code, *capsys.readouterr())

    return run
