"""The controller's HTTP interface on a Unix socket, for the command line and nginx.

Only this user can reach it (mode 0600, in a private directory). nginx publishes three of its paths,
/readyz, /health and /metrics, which reveal nothing sensitive.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from launcher.controller.metrics import farm_metrics, join
from launcher.controller.observe import device_memory
from launcher.controller.probe import NoResponseError, get
from launcher.controller.run import Controller, RefusedError
from launcher.controller.view import view

log = logging.getLogger("controller")

WORKER_SECONDS = 1.0
"""Timeout for a worker's report in seconds; a busy external server may not respond at all."""
MEMORY_AGE = 2.0
"""Seconds that measured memory is reused: reading it takes milliseconds for each process."""
SOCKET_CHECK_SECONDS = 1.0
"""Seconds between two checks that the socket's file exists."""
PUBLIC_REPORT = ("model", "engine", "provider", "dtype", "sample_rate", "voices")
"""Fields of a worker's own report that /health includes."""

Handler = Callable[[Request], Awaitable[Response]]


def failure(message: str, status: int, code: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status_code=status)


class Admin:
    """The routes over one controller."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._memory: tuple[float, dict[str, tuple[int, str]], dict[str, int]] = (
            float("-inf"),
            {},
            {},
        )
        """When it was measured, of which processes, and the bytes."""
        self._measuring = asyncio.Lock()
        self._unreadable: set[str] = set()
        """Workers whose metrics page was invalid; each is reported once."""

    def app(self) -> Starlette:
        routes = [
            Route("/workers", self._guard(self.workers), methods=["GET"]),
            Route("/workers", self._guard(self.scale), methods=["PUT"]),
            Route("/workers/{id}/drain", self._guard(self.drain), methods=["POST"]),
            Route("/workers/{id}/restart", self._guard(self.restart), methods=["POST"]),
            Route("/restart", self._guard(self.restart), methods=["POST"]),
            Route("/rollout", self._guard(self.roll_out), methods=["POST"]),
            Route("/plan", self._guard(self.plan), methods=["GET"]),
            Route("/livez", self._guard(self.livez), methods=["GET"]),
            Route("/readyz", self._guard(self.readyz), methods=["GET"]),
            Route("/health", self._guard(self.health), methods=["GET"]),
            Route("/metrics", self._guard(self.metrics), methods=["GET"]),
        ]
        return Starlette(routes=routes)

    def _guard(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            try:
                return await handler(request)
            except RefusedError as refusal:
                code = "not_found" if refusal.status == 404 else "refused"
                return failure(str(refusal), refusal.status, code)

        return guarded

    async def workers(self, request: Request) -> Response:
        """Return the state of every worker, its memory and its own health report."""
        del request
        described = view(self._controller)
        memory = await self._measured()
        reports = await self._reports()
        for worker in described["workers"]:
            worker["memory_bytes"] = memory.get(worker["id"])
            worker["health"] = reports.get(worker["id"])
        return JSONResponse(described)

    async def scale(self, request: Request) -> Response:
        """Scale to ``{"count": N}``, or to the configured count with ``{"count": "auto"}``."""
        try:
            count = (await request.json())["count"]
        except (ValueError, KeyError, TypeError):
            count = None
        is_number = isinstance(count, int) and not isinstance(count, bool) and count >= 0
        if not is_number and count != "auto":
            return failure(
                'the body must be {"count": N}, with N a non-negative integer or "auto"',
                400,
                "bad_count",
            )
        warnings = await self._controller.scale(count if is_number else None)
        return JSONResponse({**view(self._controller), "warnings": list(warnings)})

    async def drain(self, request: Request) -> Response:
        await self._controller.drain(request.path_params["id"])
        return JSONResponse(view(self._controller))

    async def restart(self, request: Request) -> Response:
        id_ = request.path_params.get("id")
        await self._controller.restart((id_,) if id_ else ())
        return JSONResponse(view(self._controller))

    async def roll_out(self, request: Request) -> Response:
        """Roll out ``{"generation": N, "base": N, "follow": bool}``, which `up` has written."""
        try:
            body = await request.json()
            number, base, follow = int(body["generation"]), int(body["base"]), bool(body["follow"])
        except (ValueError, KeyError, TypeError):
            return failure(
                'the body must be {"generation": N, "base": N, "follow": bool}', 400, "bad_body"
            )
        await self._controller.roll_out(number, base, follow)
        return JSONResponse(view(self._controller))

    async def plan(self, request: Request) -> Response:
        del request
        return JSONResponse(self._controller.farm.plan.to_json())

    async def livez(self, request: Request) -> Response:
        del request
        return JSONResponse({"status": "live"})

    async def readyz(self, request: Request) -> Response:
        """Return 200 when at least one worker is ready."""
        del request
        ready = len(self._controller.ready())
        body = {"status": "ready" if ready else "not ready", "ready": ready}
        if ready:
            return JSONResponse(body)
        return JSONResponse(body, status_code=503, headers={"Retry-After": "2"})

    async def health(self, request: Request) -> Response:
        """Return what is public: status, model, counts, and the engine. 200 as /readyz."""
        del request
        described = view(self._controller)
        reports = await self._reports()
        states = [worker["state"] for worker in described["workers"]]
        ready, count = states.count("ready"), described["count"]
        failed = described["generation"]["failure"] is not None
        status = "ready" if ready >= count and ready and not failed else "degraded"
        body = {
            "status": status if ready else "not ready",
            "model": self._controller.farm.settings.model.name,
            "ready": ready,
            "count": count,
            "workers": [
                {
                    "id": worker["id"],
                    "state": worker["state"],
                    **{
                        key: value
                        for key in PUBLIC_REPORT
                        if (value := reports.get(worker["id"], {}).get(key)) is not None
                    },
                }
                for worker in described["workers"]
            ],
        }
        if failed:
            body["rollout"] = (
                "the last configuration could not be rolled out; the previous one is in force"
            )
        return JSONResponse(body, status_code=200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        del request
        texts = await self._get_all("/metrics")
        own = farm_metrics(
            view(self._controller),
            self._controller.memory.replaced,
            await self._measured(),
            self._controller.farm.settings.model.name,
        )
        pages = {id_: body.decode(errors="replace") for id_, body in texts.items()}
        page, unreadable = join(pages, own)
        for id_ in sorted(set(unreadable) - self._unreadable):
            log.warning("%s: its /metrics is not in Prometheus's text format and is left out", id_)
        self._unreadable |= set(unreadable)
        return PlainTextResponse(page, media_type="text/plain; version=0.0.4")

    async def _reports(self) -> dict[str, dict[str, Any]]:
        """Return the health report of every ready worker, except external servers."""
        reports = {}
        for id_, body in (await self._get_all("/health", own=True)).items():
            try:
                report = json.loads(body)
            except ValueError:
                continue
            if isinstance(report, dict):
                reports[id_] = report
        return reports

    async def _get_all(self, path: str, own: bool = False) -> dict[str, bytes]:
        """Return the response of every ready worker to ``GET path``; failures are left out.

        ``own``: skip external servers.
        """
        controller = self._controller

        async def fetch(id_: str) -> tuple[str, bytes] | None:
            try:
                status, body = await get(controller.farm.port_of(id_), path, WORKER_SECONDS)
            except NoResponseError:
                return None
            return (id_, body) if status == 200 else None

        ids = [
            id_
            for id_ in controller.ready()
            if not (own and controller.generation_of(id_).is_external)
        ]
        responses = await asyncio.gather(*map(fetch, ids))
        return dict(response for response in responses if response is not None)

    async def _measured(self) -> dict[str, int]:
        """Return the memory of every running worker, at most MEMORY_AGE old."""
        async with self._measuring:
            at, measured, memory = self._memory
            holders = {
                id_: (record.pid, record.device)
                for id_, record in self._controller.memory.records.items()
                if record.pid
            }
            if time.monotonic() - at > MEMORY_AGE or holders != measured:
                memory = await asyncio.to_thread(device_memory, holders)
                self._memory = time.monotonic(), holders, memory
            return memory


class AdminServer(uvicorn.Server):
    """uvicorn on a Unix socket, without logs, that exits with 0 after SIGTERM.

    It also exits when its socket's file was deleted: supervisord restarts the controller, which
    creates the socket again.
    """

    def __init__(self, controller: Controller) -> None:
        super().__init__(
            uvicorn.Config(
                Admin(controller).app(),
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=3,
            )
        )
        self._path = controller.farm.admin_socket

    async def serve_on_socket(self) -> None:
        """Serve until SIGTERM, or until the socket's file is deleted."""
        bound = listen(self._path)
        guard = asyncio.create_task(self._end_without_socket())
        try:
            await self.serve(sockets=[bound])
        finally:
            guard.cancel()

    async def _end_without_socket(self) -> None:
        parent = os.getppid()
        # Without supervisord there is nothing left to control, and the workers serve on.
        while self._path.exists() and os.getppid() == parent:  # noqa: ASYNC110
            await asyncio.sleep(SOCKET_CHECK_SECONDS)
        self.should_exit = True


def listen(path: Path) -> socket.socket:
    """Return a listening Unix socket that only this user can reach. Raises OSError."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    path.unlink(missing_ok=True)
    mask = os.umask(0o177)
    try:
        bound.bind(str(path))
    finally:
        os.umask(mask)
    bound.listen(128)
    return bound
