"""The access log: one record for every request that the model gets."""

from __future__ import annotations

import logging
from typing import Any

from workers.http.context import RequestContext
from workers.logs import log


def log_request(context: RequestContext) -> None:
    """Log one record for a finished request."""
    if not log.isEnabledFor(logging.INFO):
        return
    job = context.job
    fields: dict[str, Any] = {
        "id": context.id,
        "method": context.method,
        "path": context.path,
        "status": 499 if context.disconnected else context.status,
        "queue_ms": round(1000 * job.queue_seconds if job else 0.0, 2),
        "inference_ms": round(1000 * job.service_seconds if job else 0.0, 2),
        "total_ms": round(1000 * context.seconds, 2),
    }
    if context.cut is not None:
        fields["cut"] = context.cut
    if context.dropped is not None:
        fields["dropped"] = context.dropped.stage
    if context.audio_seconds:
        fields["audio_s"] = round(context.audio_seconds, 2)
    log.info("request", extra={"fields": fields})
