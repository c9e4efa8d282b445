"""What tests share."""

import pytest

from raybert.ray_session import RayConfig
from raybert.ray_session import ray_session as session


@pytest.fixture(scope="session")
def ray_session():
    """One Ray on this machine for all tests that need it."""
    import ray

    with session(RayConfig(object_store_gb=0.5), workers=2):
        yield ray
