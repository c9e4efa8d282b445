"""The throughput of an interval."""

import pytest

from raybert.train.distributed import Group
from raybert.train.throughput import ThroughputMeter, gpu_peak_flops, slowest_ranks


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("A100-40G", 312),  # Ray's name
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-32GB", 112),
        ("Tesla V100S-PCIE-32GB", 130),
        ("NVIDIA RTX A6000", 155),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("Quadro RTX 6000", 0),
        ("NVIDIA RTX A1000", 0),
        ("NVIDIA RTX A1000 Laptop GPU", 0),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 0),
        ("GRID A100-10C", 0),
        ("NVIDIA A40-48Q", 0),
        ("NVIDIA T400 4GB", 0),
        ("NVIDIA GeForce RTX 4090", 0),
        ("", 0),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_whole_name(name, tflops):
    assert gpu_peak_flops(name) == tflops * 1e12


def test_the_slowest_rank_of_one_is_itself(monkeypatch):
    meter = ThroughputMeter()
    for waited in (0.1, 0.3):
        meter.add(10, waited, 0.5)
    assert slowest_ranks(Group(), meter) == {
        "data_wait_max": 0.2,
        "data_wait_rank": 0,
        "own_seconds": 0.7,
        "own_seconds_max": 0.7,
        "own_seconds_rank": 0,
    }


def test_rates_are_those_of_the_interval(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("raybert.train.throughput.time.perf_counter", lambda: now[0])
    meter = ThroughputMeter()
    for _ in range(4):
        now[0] += 0.5
        meter.add(1000, 0.125)
    assert meter.read() == {"tokens_per_second": 2000.0, "step_seconds": 0.5, "data_wait": 0.125}
    now[0] += 1
    meter.add(10, 0.0)
    assert meter.read()["tokens_per_second"] == 10.0
