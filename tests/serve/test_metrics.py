"""The metrics of a replica, in Prometheus' text format."""

import pickle

import pytest
from prometheus_client.parser import text_string_to_metric_families

from raybert.serve.runtime.metrics import ServeMetrics, render


def samples(metrics):
    """All samples of a scrape, by name and labels."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(render([metrics.families()]))
        for sample in family.samples
    }


def test_counters_add_up_by_label_and_carry_the_replicas_name():
    metrics = ServeMetrics(replica="r1")
    metrics.add("requests_total", route="/predict", status="200")
    metrics.add("requests_total", route="/predict", status="200")
    metrics.add("batch_seconds_total", 0.25, model='with "quotes"\n')
    replica = ("replica", "r1")
    assert samples(metrics) == {
        ("raybert_requests_total", replica, ("route", "/predict"), ("status", "200")): 2,
        ("raybert_batch_seconds_total", ("model", 'with "quotes"\n'), replica): 0.25,
    }


def test_latencies_are_a_cumulative_histogram():
    metrics = ServeMetrics()
    for seconds in (0.005, 0.2, 30):
        metrics.observe("/predict", seconds)
    found = samples(metrics)
    route = ("route", "/predict")
    buckets = {key[1][1]: value for key, value in found.items() if key[0].endswith("_bucket")}
    assert [buckets[bound] for bound in ("0.005", "0.1", "0.25", "10.0", "+Inf")] == [1, 1, 2, 2, 3]
    assert found["raybert_request_seconds_count", route] == 3
    assert found["raybert_request_seconds_sum", route] == 30.205


def test_gauges_are_read_at_each_scrape():
    metrics, values = ServeMetrics(replica="r1"), [3.0, 4.0]
    metrics.watch_queue(lambda: values.pop(0))
    name = ("raybert_queued_tokens", ("replica", "r1"))
    assert [samples(metrics), samples(metrics)] == [{name: 3}, {name: 4}]


@pytest.mark.parametrize("value", [1_234_567, 98_765_432_101, 2**53 - 1])
def test_large_counters_are_not_rounded(value):
    metrics = ServeMetrics()
    metrics.add("batch_tokens_total", value, model="m")
    metrics.add("batch_tokens_total", 0.0, model="m")
    assert samples(metrics)["raybert_batch_tokens_total", ("model", "m")] == value


def test_the_metrics_of_replicas_are_one_scrape():
    made = [ServeMetrics(replica=name) for name in ("r1", "r2")]
    for number, metrics in enumerate(made, 1):
        metrics.add("requests_total", number, route="/predict", status="200")
        metrics.watch_queue(lambda number=number: 10 * number)
    found = pickle.loads(pickle.dumps([metrics.families() for metrics in made]))
    text = render(found, refused=7)
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert [line for line in text.splitlines() if line.startswith("# TYPE raybert_requests")] == [
        "# TYPE raybert_requests_total counter"
    ]
    queued = {one.labels["replica"]: one.value for one in families["raybert_queued_tokens"].samples}
    assert queued == {"r1": 10, "r2": 20}
    assert sum(one.value for one in families["raybert_requests"].samples) == 3
    [refused] = families["raybert_refused_by_haproxy"].samples
    assert (refused.name, refused.value) == ("raybert_refused_by_haproxy_total", 7)
    assert "haproxy" not in render(found)
