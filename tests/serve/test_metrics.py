"""The metrics of a replica, in Prometheus' text format."""

from prometheus_client.parser import text_string_to_metric_families

from raybert.serve.runtime.metrics import ServeMetrics


def samples(metrics):
    """All samples of a scrape, by name and labels."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.render())
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
