"""The throughput of an interval."""

from raybert.train.throughput import ThroughputMeter


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
