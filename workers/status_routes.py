"""What a worker tells of itself: probes, health, metrics, models, voices."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from workers.answers import as_json
from workers.device_errors import is_sticky
from workers.errors import ApiError, unknown
from workers.logs import log
from workers.memory import resident_bytes
from workers.worker import Worker

_PATIENCE = 0.5
"""Seconds that /health waits for an idle model's own report before it gives the last one."""


class Status:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._asking: asyncio.Future[None] | None = None

    async def live(self, request: Request) -> Response:
        return _json({"status": "live"})

    async def ready(self, request: Request) -> Response:
        if self._worker.draining or self._worker.line.closed:
            error = ApiError(503, "The worker is ending.", code="draining")
            return _json(error.body(), 503, {"retry-after": "1"})
        return _json({"status": "ready"})

    async def health(self, request: Request) -> Response:
        await self._refresh()
        worker = self._worker
        line = worker.line
        mean = line.mean_service_seconds
        served = worker.served
        speech = {"sample_rate": served.sample_rate, "voices": served.voices}
        report = {
            "device": served.device,
            "dtype": None,
            "engine": None,
            "provider": None,
            **(speech if served.speaks else {}),
            **served.report,
            "status": "draining" if worker.draining or line.closed else "ready",
            "id": worker.id,
            "pid": os.getpid(),
            "model": worker.spec.name,
            "running": line.running,
            "waiting": line.waiting,
            "line": line.limit,
            "served": line.served,
            "service_seconds": None if mean is None else round(mean, 6),
            "uptime_seconds": round(time.time() - worker.started, 3),
            "resident_bytes": resident_bytes(),
        }
        return _json(report)

    async def metrics(self, request: Request) -> Response:
        return Response(self._worker.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        data = [self._model(name) for name in self._worker.spec.names]
        return _json({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._worker.spec.names:
            raise unknown("model", name, self._worker.spec.names)
        return _json(self._model(name))

    async def voices(self, request: Request) -> Response:
        return _json({"voices": self._worker.served.voices})

    async def longest_request(self, request: Request) -> Response:
        """What sizing is to send; asked for before there is any traffic."""
        loop = asyncio.get_running_loop()
        longest = await loop.run_in_executor(
            self._worker.device_thread, self._worker.served.longest_request
        )
        if longest is None:
            raise ApiError(404, "The model gives no longest_request().", code="not_found")
        return _json(longest)

    def _model(self, name: str) -> dict[str, Any]:
        created = int(self._worker.started)
        return {"id": name, "object": "model", "created": created, "owned_by": "gpufarm"}

    async def _refresh(self) -> None:
        """Ask the model again when its thread is free; a busy one is not waited for."""
        if self._asking is None and self._worker.line.idle:
            self._asking = asyncio.ensure_future(self._ask())
        if self._asking is not None and self._worker.line.idle:
            await asyncio.wait([self._asking], timeout=_PATIENCE)

    async def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._worker.device_thread, self._worker.served.refresh)
        except Exception as error:
            log.warning("the model's health() failed: %s: %s", type(error).__name__, error)
            if is_sticky(error):
                self._worker.line.lose()
        finally:
            self._asking = None


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(as_json(value), status, headers, media_type="application/json")
