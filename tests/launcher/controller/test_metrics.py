"""Many workers' metrics as one page, read back by Prometheus's own parser."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from launcher.controller.metrics import farm_metrics, join
from tests import promtool

VIEW = {
    "count": 2,
    "workers": [
        {"id": "w1", "state": "ready", "ready_seconds": 1.5},
        {"id": "w2", "state": "failed", "ready_seconds": None},
    ],
}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def exposition(worker: str) -> str:
    """As an own worker writes it."""
    registry = CollectorRegistry()
    both = ["worker", "model"]
    counter = Counter("gpufarm_requests", "All.", [*both, "code"], registry=registry)
    counter.labels(worker, "m", "200").inc(3)
    histogram = Histogram("gpufarm_seconds", "Time.", both, registry=registry)
    histogram.labels(worker, "m").observe(0.2)
    startup = Gauge("gpufarm_worker_startup_seconds", "Here.", [*both, "phase"], registry=registry)
    startup.labels(worker, "m", "load").set(1.25)
    return generate_latest(registry).decode()


def samples(page: str) -> Samples:
    """Every series of a page; each may come once."""
    found: Samples = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            series = sample.name, frozenset(sample.labels.items())
            assert series not in found
            found[series] = sample.value
    return found


def series(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def test_each_family_comes_once_with_every_workers_samples() -> None:
    page, unreadable = join({"w1": exposition("w1"), "w2": exposition("w2")})
    assert unreadable == []
    families = {family.name: family for family in text_string_to_metric_families(page)}
    requests = [s for s in families["gpufarm_requests"].samples if s.name.endswith("_total")]
    assert {sample.labels["worker"]: sample.value for sample in requests} == {"w1": 3, "w2": 3}
    assert families["gpufarm_requests"].documentation == "All."
    histogram = families["gpufarm_seconds"].samples
    assert {sample.labels["worker"] for sample in histogram} == {"w1", "w2"}
    assert page.count("# TYPE gpufarm_seconds histogram") == 1


def test_an_external_servers_metrics_get_the_label() -> None:
    page, _ = join({"w1": 'up 1\nx{a="b,}"} 2 170\n', "w2": "up 0\n"})
    assert samples(page) == {
        series("up", worker="w1"): 1,
        series("up", worker="w2"): 0,
        series("x", a="b,}", worker="w1"): 2,
    }
    assert 'x{a="b,}",worker="w1"} 2.0 170\n' in page


def test_a_label_worker_of_another_meaning_is_kept_under_another_name() -> None:
    page, _ = join(dict.fromkeys(("w1", "w2"), 'calls{worker="0"} 5\n'))
    assert samples(page) == {
        series("calls", worker="w1", exported_worker="0"): 5,
        series("calls", worker="w2", exported_worker="0"): 5,
    }


def test_odd_characters_in_labels_and_help_come_through() -> None:
    registry = CollectorRegistry()
    odd = 'a "quote", a \\ and\na line }'
    Gauge("x", odd, ["a"], registry=registry).labels(odd).set(1)
    page, _ = join({"w1": generate_latest(registry).decode()})
    assert samples(page) == {series("x", a=odd, worker="w1"): 1}
    assert next(iter(text_string_to_metric_families(page))).documentation == odd


@pytest.mark.parametrize(
    "text",
    [
        "<html><body>Not here</body></html>",
        "<style>\nbody { margin: 0 }\n</style>\n",
        "body { }\nh1 { margin: 1 }\n",
        "up 1\nnonsense\n",
        '{"error": {"message": "Not here"}}',
        'x{a="b" 1',
        "# TYPE x nothing\nx 1\n",
        '{"a name with blanks"} 1\n',
        "\0\1\2",
        "ä 1\n",
    ],
)
def test_a_page_that_is_not_metrics_is_left_out_and_reported(text: str) -> None:
    page, unreadable = join({"w1": text, "w2": "up 1\n"})
    assert unreadable == ["w1"]
    assert samples(page) == {series("up", worker="w2"): 1}
    assert "margin" not in page


def test_types_that_differ_between_workers_make_no_second_family() -> None:
    page, _ = join(
        {"w1": "# TYPE x_total counter\nx_total 1\n", "w2": "x_total 2\n", "w3": "x_total 3\n"}
    )
    assert page.count("# TYPE") == 1
    assert sorted(samples(page).values()) == [1, 2, 3]


def test_what_the_controller_knows() -> None:
    page, _ = join({}, farm_metrics(VIEW, {"crash": 2}, {"w1": 1000}, "demo"))
    found = samples(page)
    assert found[series("gpufarm_workers", state="ready")] == 1
    assert found[series("gpufarm_workers", state="stopped")] == 0
    assert found[series("gpufarm_workers_desired")] == 2
    assert found[series("gpufarm_worker_restarts_total", reason="crash")] == 2
    assert found[series("gpufarm_worker_memory_bytes", worker="w1")] == 1000
    startup = series("gpufarm_worker_startup_seconds", worker="w1", model="demo", phase="total")
    assert found[startup] == 1.5


def test_the_startup_times_are_one_family_of_workers_and_controller() -> None:
    page, _ = join({"w1": exposition("w1")}, farm_metrics(VIEW, {}, {}, "m"))
    assert page.count("# HELP gpufarm_worker_startup_seconds ") == 1
    assert page.count("# TYPE gpufarm_worker_startup_seconds ") == 1
    found = {labels for name, labels in samples(page) if name == "gpufarm_worker_startup_seconds"}
    assert {frozenset(name for name, _ in labels) for labels in found} == {
        frozenset({"worker", "model", "phase"})
    }
    assert {dict(labels)["phase"] for labels in found} == {"load", "total"}


def test_prometheus_accepts_the_page() -> None:
    pages = {"w1": exposition("w1"), "w2": "<html>\nbody { margin: 0 }\n</html>"}
    promtool.check(join(pages, farm_metrics(VIEW, {"crash": 2}, {"w1": 1000}, "m"))[0])
