"""The numbers of several replicas add up, and Prometheus reads them."""

from prometheus_client.parser import text_string_to_metric_families

from serve.metrics import METRICS, PREFIX, MetricStore, prometheus_text, sum_snapshots


def read(text):
    """(name, labels as a sorted tuple) -> value, by Prometheus' own parser."""
    return {
        (sample.name.removeprefix(PREFIX), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_an_idle_server_announces_every_metric():
    text = prometheus_text(MetricStore().snapshot())
    assert all(f"# TYPE {PREFIX}{name} {metric.kind}" in text for name, metric in METRICS.items())
    assert read(text) == {}


def test_counters_and_histograms_of_two_replicas_sum_snapshots():
    stores = MetricStore(), MetricStore()
    for store, seconds in zip(stores, (0.003, 100.0), strict=True):
        store.count("requests_total", route="/score", status="200")
        store.observe("request_seconds", seconds, route="/score")
        store.set_gauge("scorers_ready", 2)
        store.set_gauge("queue_samples", 5)
    values = read(prometheus_text(sum_snapshots(store.snapshot() for store in stores)))
    route = ("route", "/score")
    assert values["requests_total", (route, ("status", "200"))] == 2
    assert values["request_seconds_bucket", (("le", "0.0025"), route)] == 0
    assert values["request_seconds_bucket", (("le", "0.005"), route)] == 1
    assert values["request_seconds_bucket", (("le", "60.0"), route)] == 1
    assert values["request_seconds_bucket", (("le", "+Inf"), route)] == 2
    assert values["request_seconds_count", (route,)] == 2
    assert values["request_seconds_sum", (route,)] == 100.003
    assert values["queue_samples", ()] == 10
    assert values["scorers_ready", ()] == 2  # both replicas count the same scorers


def test_large_counters_keep_every_digit():
    store = MetricStore()
    store.count("tokens_total", 123_456_789_012)
    assert f"{PREFIX}tokens_total 123456789012\n" in prometheus_text(store.snapshot())
