"""Logs of a worker: one line each on stderr, ``time level worker message key=value …``."""

from __future__ import annotations

import logging
import sys
import time

from workers.exchange import Exchange

log = logging.getLogger("gpufarm.worker")


class _OneLine(logging.Formatter):
    """Whatever a record holds, a traceback too, it stays on one line."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def format(self, record: logging.LogRecord) -> str:
        lines = [line for line in super().format(record).splitlines() if line.strip()]
        return " | ".join(lines)


class _Expected(logging.Filter):
    """uvicorn complains about answers that were cut on purpose; the request's own line tells."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "without completing response" not in record.getMessage()


def set_up(worker_id: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    shown = worker_id.replace("%", "%%")
    handler.setFormatter(_OneLine(f"%(asctime)s %(levelname)s {shown} %(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    log.setLevel(logging.INFO)
    uvicorn = logging.getLogger("uvicorn.error")
    uvicorn.setLevel(logging.WARNING)
    uvicorn.addFilter(_Expected())
    logging.captureWarnings(True)


def request_line(exchange: Exchange) -> None:
    """The one line that every request for the model leaves."""
    if not log.isEnabledFor(logging.INFO):
        return
    job = exchange.job
    queue = 1000 * job.queue_seconds if job else 0.0
    inference = 1000 * job.service_seconds if job else 0.0
    extra = ""
    if exchange.cut is not None:
        extra += f" cut={exchange.cut}"
    if exchange.dropped is not None:
        extra += f" dropped={exchange.dropped.stage}"
    if exchange.audio_seconds:
        extra += f" audio_s={exchange.audio_seconds:.2f}"
    status = 499 if exchange.left else exchange.status
    log.info(
        "request id=%s %s %s status=%s queue_ms=%.2f inference_ms=%.2f total_ms=%.2f%s",
        exchange.id,
        exchange.method,
        exchange.path,
        status,
        queue,
        inference,
        1000 * exchange.seconds,
        extra,
    )
