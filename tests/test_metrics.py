"""Many workers' metrics as one text, read back by Prometheus's own parser."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from launcher.control.metrics import farm_metrics, join

VIEW = {
    "count": 2,
    "workers": [
        {"id": "w1", "state": "ready", "ready_seconds": 1.5},
        {"id": "w2", "state": "failed", "ready_seconds": None},
    ],
}


def exposition(worker: str) -> str:
    registry = CollectorRegistry()
    Counter("gpufarm_requests", "All.", ["worker", "code"], registry=registry).labels(
        worker, "200"
    ).inc(3)
    Histogram("gpufarm_seconds", "Time.", registry=registry).observe(0.2)
    return generate_latest(registry).decode()


def test_each_family_comes_once_with_every_workers_samples() -> None:
    text = join({"w1": exposition("w1"), "w2": exposition("w2")})
    families = {family.name: family for family in text_string_to_metric_families(text)}
    requests = [s for s in families["gpufarm_requests"].samples if s.name.endswith("_total")]
    assert {sample.labels["worker"]: sample.value for sample in requests} == {"w1": 3, "w2": 3}
    assert families["gpufarm_requests"].documentation == "All."
    histogram = families["gpufarm_seconds"].samples
    assert {sample.labels["worker"] for sample in histogram} == {"w1", "w2"}
    assert text.count("# TYPE gpufarm_seconds histogram") == 1


def test_a_foreign_servers_metrics_get_the_label() -> None:
    text = join({"w1": 'up 1\nx{a="b,}"} 2 170\n', "w2": "up 0\nnonsense\n"})
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    assert [(s.name, s.labels, s.value) for s in samples] == [
        ("up", {"worker": "w1"}, 1),
        ("up", {"worker": "w2"}, 0),
        ("x", {"a": "b,}", "worker": "w1"}, 2),
    ]


def test_what_the_controller_knows() -> None:
    text = farm_metrics(VIEW, {"crash": 2}, {"w1": 1000})
    samples = {
        (s.name, *sorted(s.labels.items())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
    assert samples["gpufarm_workers", ("state", "ready")] == 1
    assert samples["gpufarm_workers", ("state", "stopped")] == 0
    assert samples["gpufarm_workers_desired",] == 2
    assert samples["gpufarm_worker_restarts_total", ("reason", "crash")] == 2
    assert samples["gpufarm_worker_memory_bytes", ("worker", "w1")] == 1000
    startup = ("gpufarm_worker_startup_seconds", ("phase", "total"), ("worker", "w1"))
    assert samples[startup] == 1.5
