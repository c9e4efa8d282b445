"""What tests share."""

import logging

import pytest


@pytest.fixture(scope="session")
def ray_session():
    """One Ray on this machine for all tests that need it."""
    import ray

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.init(num_cpus=4, object_store_memory=512 << 20, logging_level=logging.ERROR)
    yield ray
    ray.shutdown()
