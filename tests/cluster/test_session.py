"""Connecting to a cluster: what is said where a command will wait."""

import logging

import pytest

from raybert.cluster.session import warn_if_busy


@pytest.mark.parametrize(
    ("free", "is_said"),
    [({"CPU": 1.0}, False), ({"CPU": 0.5, "GPU": 4.0}, True), ({}, True)],
)
def test_a_cluster_whose_cpus_are_all_taken_is_named(caplog, free, is_said):
    with caplog.at_level(logging.WARNING):
        warn_if_busy("head:6379", {"CPU": 8.0}, free)
    assert ("head:6379 has 8 CPUs, and none is free" in caplog.text) == is_said
