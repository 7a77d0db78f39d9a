"""The status routes of a worker: probes, health, metrics, models, voices."""

from __future__ import annotations

import os
import time
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from workers.errors import ApiError, not_found
from workers.http.context import RequestContext
from workers.http.memory import resident_bytes
from workers.http.state import WorkerState
from workers.model.responses import as_json


class Status:
    def __init__(self, worker: WorkerState) -> None:
        self._worker = worker

    async def live(self, request: Request) -> Response:
        return _json({"status": "live"})

    async def ready(self, request: Request) -> Response:
        if self._worker.draining or self._worker.queue.closed:
            error = ApiError(503, "The worker is shutting down; retry after 1 s.", code="draining")
            return _json(error.body(), 503, {"retry-after": "1"})
        return _json({"status": "ready"})

    async def health(self, request: Request) -> Response:
        """Return the last report: all of it to direct clients, a subset through the balancer."""
        return _json(self._public_report() if _is_public(request) else self._report())

    def _public_report(self) -> dict[str, Any]:
        """The part of the report that reveals nothing about the machine."""
        report = self._report()
        keys = ["status", "model", "engine", "provider", "running", "waiting"]
        if self._worker.loaded.speaks:
            keys += ["sample_rate", "voices"]
        kind = self._worker.loaded.device.partition(":")[0]
        return {**{key: report[key] for key in keys}, "device": kind}

    def _report(self) -> dict[str, Any]:
        worker = self._worker
        queue = worker.queue
        loaded = worker.loaded
        mean = queue.mean_service_seconds
        speech = {"sample_rate": loaded.sample_rate, "voices": loaded.voices}
        return {
            "device": loaded.device,
            "dtype": None,
            "engine": None,
            "provider": None,
            **(speech if loaded.speaks else {}),
            **loaded.report,
            "status": "draining" if worker.draining or queue.closed else "ready",
            "id": worker.id,
            "pid": os.getpid(),
            "model": worker.spec.name,
            "running": queue.running,
            "waiting": queue.waiting,
            "queue_size": queue.limit,
            "served": queue.completed,
            "service_seconds": None if mean is None else round(mean, 6),
            "uptime_seconds": round(time.time() - worker.started, 3),
            "resident_bytes": resident_bytes(),
        }

    async def metrics(self, request: Request) -> Response:
        return Response(self._worker.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        data = [self._model(name) for name in self._worker.spec.names]
        return _json({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._worker.spec.names:
            raise not_found("model", name, self._worker.spec.names)
        return _json(self._model(name))

    async def voices(self, request: Request) -> Response:
        return _json({"voices": self._worker.loaded.voices})

    async def longest_request(self, request: Request) -> Response:
        """Return the request with which sizing measures the footprint. Direct clients only."""
        if _is_public(request):
            raise HTTPException(404)
        longest = self._worker.loaded.longest_request
        if longest is None:
            raise ApiError(404, "The model does not define longest_request().", code="not_found")
        return _json(longest)

    def _model(self, name: str) -> dict[str, Any]:
        created = self._worker.spec.created
        return {"id": name, "object": "model", "created": created, "owned_by": "gpufarm"}


def _is_public(request: Request) -> bool:
    """Whether it came through the balancer, which marks the requests that it forwards."""
    context: RequestContext = request.scope["context"]
    return context.balanced


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(as_json(value), status, headers, media_type="application/json")
