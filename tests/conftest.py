"""What tests share."""

import signal

import pytest

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
