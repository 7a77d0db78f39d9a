"""The controller's HTTP interface on loopback: what the command line and nginx ask."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from launcher.control.controller import Controller, RefusedError
from launcher.control.metrics import farm_metrics, join
from launcher.control.observe import device_memory
from launcher.control.probe import NoAnswerError, get
from launcher.control.view import view

log = logging.getLogger("controller")

HOST = "127.0.0.1"
WORKER_SECONDS = 1.0
"""How long a worker may take to tell its health; a busy foreign server may not answer at all."""
MEMORY_AGE = 2.0
"""Reading a process's memory costs milliseconds of its page tables, so it is not done at will."""

Handler = Callable[[Request], Awaitable[Response]]


def failure(message: str, status: int, code: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status_code=status)


class LoopbackOnly:
    """Refuses what a web page could make a browser send: a foreign Host or Origin."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
            origin = headers.get(b"origin")
            foreign = origin is not None and not _is_loopback(origin)
            if foreign or not _is_loopback(f"http://{headers.get(b'host', '')}"):
                answer = failure("only this machine may ask here", 403, "not_loopback")
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_loopback(url: str) -> bool:
    try:
        return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    except ValueError:
        return False


class Admin:
    """The routes over one controller."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._memory: tuple[float, dict[str, int], dict[str, int]] = (float("-inf"), {}, {})
        """When it was measured, of which pids, and the bytes."""
        self._measuring = asyncio.Lock()
        self._unreadable: set[str] = set()
        """Workers whose metrics page was not one; each is reported once."""

    def app(self) -> ASGIApp:
        routes = [
            Route("/workers", self._guard(self.workers), methods=["GET"]),
            Route("/workers", self._guard(self.scale), methods=["PUT"]),
            Route("/workers/{id}/drain", self._guard(self.drain), methods=["POST"]),
            Route("/workers/{id}/restart", self._guard(self.restart), methods=["POST"]),
            Route("/restart", self._guard(self.restart), methods=["POST"]),
            Route("/reload", self._guard(self.reload), methods=["POST"]),
            Route("/plan", self._guard(self.plan), methods=["GET"]),
            Route("/livez", self._guard(self.livez), methods=["GET"]),
            Route("/readyz", self._guard(self.readyz), methods=["GET"]),
            Route("/health", self._guard(self.health), methods=["GET"]),
            Route("/metrics", self._guard(self.metrics), methods=["GET"]),
        ]
        return LoopbackOnly(Starlette(routes=routes))

    def _guard(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            try:
                return await handler(request)
            except RefusedError as refusal:
                code = "not_found" if refusal.status == 404 else "refused"
                return failure(str(refusal), refusal.status, code)

        return guarded

    async def workers(self, request: Request) -> Response:
        del request
        return JSONResponse(await self._described())

    async def scale(self, request: Request) -> Response:
        try:
            count = (await request.json())["count"]
        except (ValueError, KeyError, TypeError):
            count = None
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            return failure('the body must be {"count": N}, N a whole number', 400, "bad_count")
        warnings = await self._controller.scale(count)
        return JSONResponse({"count": count, "warnings": list(warnings)})

    async def drain(self, request: Request) -> Response:
        await self._controller.drain(request.path_params["id"])
        return JSONResponse(view(self._controller))

    async def restart(self, request: Request) -> Response:
        id_ = request.path_params.get("id")
        await self._controller.restart((id_,) if id_ else ())
        return JSONResponse(view(self._controller))

    async def reload(self, request: Request) -> Response:
        del request
        await self._controller.reload()
        return JSONResponse(view(self._controller))

    async def plan(self, request: Request) -> Response:
        del request
        return JSONResponse(self._controller.farm.plan.to_json())

    async def livez(self, request: Request) -> Response:
        del request
        return JSONResponse({"status": "live"})

    async def readyz(self, request: Request) -> Response:
        """200 when at least one worker takes requests."""
        del request
        ready = len(self._controller.ready())
        body = {"status": "ready" if ready else "not ready", "ready": ready}
        if ready:
            return JSONResponse(body)
        return JSONResponse(body, status_code=503, headers={"Retry-After": "2"})

    async def health(self, request: Request) -> Response:
        """Every worker's state and what it says of itself; 200 as `readyz`."""
        del request
        described = await self._described()
        states = [worker["state"] for worker in described["workers"]]
        ready = states.count("ready")
        status = "ready" if ready >= described["count"] and ready else "degraded"
        body = {"status": status if ready else "not ready", "ready": ready, **described}
        return JSONResponse(body, status_code=200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        del request
        texts = await self._ask_all("/metrics")
        own = farm_metrics(
            view(self._controller),
            self._controller.memory.replaced,
            await self._measured(),
            self._controller.farm.settings.model.name,
        )
        pages = {id_: body.decode(errors="replace") for id_, body in texts.items()}
        page, unreadable = join(pages, own)
        for id_ in sorted(set(unreadable) - self._unreadable):
            log.warning("%s: its /metrics is not in Prometheus's text format; it is left out", id_)
        self._unreadable |= set(unreadable)
        return PlainTextResponse(page, media_type="text/plain; version=0.0.4")

    async def _described(self) -> dict[str, Any]:
        """The view, with every worker's memory and health."""
        described = view(self._controller)
        memory = await self._measured()
        told = {} if self._controller.farm.foreign else await self._ask_all("/health")
        for worker in described["workers"]:
            worker["memory_bytes"] = memory.get(worker["id"])
            try:
                worker["health"] = json.loads(told[worker["id"]])
            except (KeyError, ValueError):
                worker["health"] = None
        return described

    async def _ask_all(self, path: str) -> dict[str, bytes]:
        """What every ready worker answers at ``path``; those that do not are left out."""
        ready = set(self._controller.ready())
        slots = [slot for slot in self._controller.farm.plan.slots if slot.id in ready]

        async def ask(id_: str, port: int) -> tuple[str, bytes] | None:
            try:
                status, body = await get(port, path, WORKER_SECONDS)
            except NoAnswerError:
                return None
            return (id_, body) if status == 200 else None

        answers = await asyncio.gather(*(ask(slot.id, slot.port) for slot in slots))
        return dict(answer for answer in answers if answer is not None)

    async def _measured(self) -> dict[str, int]:
        """Memory of every living worker, at most MEMORY_AGE old."""
        async with self._measuring:
            at, measured, memory = self._memory
            records = self._controller.memory.records
            pids = {id_: record.pid for id_, record in records.items() if record.pid}
            if time.monotonic() - at > MEMORY_AGE or pids != measured:
                memory = await asyncio.to_thread(device_memory, self._controller.farm, pids)
                self._memory = time.monotonic(), pids, memory
            return memory


class AdminServer(uvicorn.Server):
    """uvicorn on loopback, quiet, and ending with 0 after SIGTERM."""

    def __init__(self, controller: Controller) -> None:
        super().__init__(
            uvicorn.Config(
                Admin(controller).app(),
                host=HOST,
                port=controller.farm.admin_port,
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=3,
            )
        )
