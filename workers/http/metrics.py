"""Prometheus metrics of a worker, in base units."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from workers.http.context import RequestContext
from workers.http.memory import resident_bytes
from workers.queueing.queue import RequestQueue

_SECONDS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)
_FACTORS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 5.0)


class Metrics:
    """A registry of its own; every series is labelled with the worker and the model."""

    def __init__(self, worker_id: str, model: str, queue: RequestQueue) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"worker": worker_id, "model": model}
        self._requests = self._counter("requests", "Requests, by response status.", "code")
        self._rejected = self._counter("requests_rejected", "Requests not admitted.", "reason")
        self._cancelled = self._counter(
            "requests_cancelled", "Requests dropped.", "stage", "reason"
        )
        self._duration = self._histogram("request_duration_seconds", "Arrival to last byte.")
        self._queue = self._histogram("queue_duration_seconds", "Waiting for the device.")
        self._first = self._histogram("time_to_first_byte_seconds", "Arrival to first byte.")
        self._stages = self._raw_histogram(
            "stage_duration_seconds", "Time in one stage of the model.", _SECONDS, "stage"
        )
        self._factor = self._raw_histogram(
            "real_time_factor", "Device seconds for one second of audio.", _FACTORS
        ).labels(**self._labels)
        self._audio = self._counter("audio_seconds", "Audio produced.").labels(**self._labels)
        self._startup = self._gauge("worker_startup_seconds", "Time of the start.", "phase")
        running = self._gauge("requests_in_progress", "Requests on the device: 0 or 1.")
        running.labels(**self._labels).set_function(lambda: queue.running)
        waiting = self._gauge("queue_depth", "Requests waiting in the queue.")
        waiting.labels(**self._labels).set_function(lambda: queue.waiting)
        memory = self._gauge("worker_resident_bytes", "Resident memory of the process.")
        memory.labels(**self._labels).set_function(resident_bytes)

    def started(self, phase: str, seconds: float) -> None:
        self._startup.labels(**self._labels, phase=phase).set(seconds)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(**self._labels, reason=reason).inc()

    def ended(self, context: RequestContext) -> None:
        """Count one request for the model, whatever its outcome."""
        code = context.cut or (499 if context.disconnected else context.status) or 500
        self._requests.labels(**self._labels, code=str(code)).inc()
        self._duration.observe(context.seconds)
        if context.first_byte is not None:
            self._first.observe(context.first_byte)
        job = context.job
        if job is None:
            return
        self._queue.observe(job.queue_seconds)
        if context.dropped is not None:
            dropped = context.dropped
            self._cancelled.labels(**self._labels, stage=dropped.stage, reason=dropped.reason).inc()
        for stage, seconds in list(job.work.stages.items()):
            self._stages.labels(**self._labels, stage=stage).observe(seconds)
        if context.audio_seconds:
            self._audio.inc(context.audio_seconds)
            self._factor.observe(job.service_seconds / context.audio_seconds)

    def text(self) -> bytes:
        """Return all metrics in the exposition format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(
            f"gpufarm_{name}", help_text, ["worker", "model", *labels], registry=self.registry
        )

    def _gauge(self, name: str, help_text: str, *labels: str) -> Gauge:
        return Gauge(
            f"gpufarm_{name}", help_text, ["worker", "model", *labels], registry=self.registry
        )

    def _histogram(self, name: str, help_text: str) -> Histogram:
        return self._raw_histogram(name, help_text, _SECONDS).labels(**self._labels)

    def _raw_histogram(
        self, name: str, help_text: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(
            f"gpufarm_{name}",
            help_text,
            ["worker", "model", *labels],
            buckets=buckets,
            registry=self.registry,
        )
