"""The farm's metrics page: every worker's families joined with the controller's own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

_STATES = ("starting", "ready", "draining", "stopped", "failed")
_METRIC_NAME = re.compile(r"[A-Za-z_:][A-Za-z0-9_:]*")
_LABEL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class _Page(Collector):
    """Collects families by exposed name; each family and each series appears once."""

    def __init__(self) -> None:
        self._families: dict[str, Metric] = {}
        self._series: set[tuple[str, frozenset[tuple[str, str]]]] = set()

    def add(self, family: Metric, worker: str | None = None) -> None:
        """Add samples, with the label ``worker``. A family keeps its first type and help."""
        name = f"{family.name}_total" if family.type == "counter" else family.name
        for sample in family.samples:
            labelled = sample if worker is None else _labelled(sample, worker)
            series = labelled.name, frozenset(labelled.labels.items())
            if series in self._series:
                continue
            self._series.add(series)
            if name not in self._families:
                self._families[name] = Metric(family.name, family.documentation, family.type)
            self._families[name].samples.append(labelled)

    def collect(self) -> Iterable[Metric]:
        return self._families.values()


def join(expositions: Mapping[str, str], own: Iterable[Metric] = ()) -> tuple[str, list[str]]:
    """Return one page in Prometheus's text format, and the workers whose page is left out.

    Args:
        expositions: a page by the id of the worker that it is from. Each of its series gets the
            label ``worker``; one that has it already with another value keeps that as
            ``exported_worker``. A page that is not in the text format is left out whole. A counter
            gets the suffix ``_total`` where its server does not write it.
        own: further families; their type and help hold where a worker exposes the same one.
    """
    page, unreadable = _Page(), []
    for family in own:
        page.add(family)
    for worker, text in expositions.items():
        try:
            families = _parsed(text)
        except ValueError:
            unreadable.append(worker)
            continue
        for family in families:
            page.add(family, worker)
    return generate_latest(page).decode(), unreadable


def _parsed(text: str) -> list[Metric]:
    """Parse the families of a page. Raises ValueError if it is not in the text format."""
    try:
        families = list(text_string_to_metric_families(text))
    except (
        ValueError,
        LookupError,
        TypeError,
    ) as error:  # whatever the parser raises on invalid input
        raise ValueError(f"not in Prometheus's text format: {error}") from error
    # The parser also accepts names of the format's newer version; the page uses the first.
    for family in families:
        for name in (family.name, *(sample.name for sample in family.samples)):
            if not _METRIC_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a metric's name")
        for label in {label for sample in family.samples for label in sample.labels}:
            if not _LABEL_NAME.fullmatch(label):
                raise ValueError(f"{label!r} is not a label's name")
    return families


def _labelled(sample: Sample, worker: str) -> Sample:
    labels = dict(sample.labels)
    other = labels.get("worker", worker)
    if other != worker:
        labels["exported_worker"] = other
    return sample._replace(labels=labels | {"worker": worker})


def farm_metrics(
    view: Mapping[str, Any], replaced: Mapping[str, int], memory: Mapping[str, int], model: str
) -> list[Metric]:
    """The families that the controller measures itself; ``model`` is the served model's name."""
    workers = GaugeMetricFamily("gpufarm_workers", "Workers by state.", labels=["state"])
    states = Counter(worker["state"] for worker in view["workers"])
    for state in _STATES:
        workers.add_metric([state], states[state])

    desired = GaugeMetricFamily(
        "gpufarm_workers_desired", "Workers that should run.", value=view["count"]
    )

    restarts = CounterMetricFamily(
        "gpufarm_worker_restarts", "Workers that were started again, by reason.", labels=["reason"]
    )
    for reason in ("crash", "restart"):
        restarts.add_metric([reason], replaced.get(reason, 0))

    startup = GaugeMetricFamily(
        "gpufarm_worker_startup_seconds",
        "Seconds of a worker's last start: load and warm_up of its model, and total until ready.",
        labels=["worker", "model", "phase"],
    )
    for worker in view["workers"]:
        if worker["ready_seconds"] is not None:
            startup.add_metric([worker["id"], model, "total"], worker["ready_seconds"])

    held = GaugeMetricFamily(
        "gpufarm_worker_memory_bytes",
        "Memory of a worker on its device (RAM on the CPU).",
        labels=["worker"],
    )
    for id_, size in memory.items():
        held.add_metric([id_], size)
    return [workers, desired, restarts, startup, held]
