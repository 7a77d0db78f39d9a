"""The access log: one record for every request that the model gets."""

from __future__ import annotations

import logging
from typing import Any

from workers.http.context import Exchange
from workers.logs import log


def request_line(exchange: Exchange) -> None:
    """The one record that every request for the model leaves."""
    if not log.isEnabledFor(logging.INFO):
        return
    job = exchange.job
    fields: dict[str, Any] = {
        "id": exchange.id,
        "method": exchange.method,
        "path": exchange.path,
        "status": 499 if exchange.left else exchange.status,
        "queue_ms": round(1000 * job.queue_seconds if job else 0.0, 2),
        "inference_ms": round(1000 * job.service_seconds if job else 0.0, 2),
        "total_ms": round(1000 * exchange.seconds, 2),
    }
    if exchange.cut is not None:
        fields["cut"] = exchange.cut
    if exchange.dropped is not None:
        fields["dropped"] = exchange.dropped.stage
    if exchange.audio_seconds:
        fields["audio_s"] = round(exchange.audio_seconds, 2)
    log.info("request", extra={"fields": fields})
