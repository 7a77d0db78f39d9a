"""``POST /predict``: JSON or bytes in; a value, bytes, or a stream of either out."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from workers.errors import ApiError, invalid
from workers.http.context import RequestContext, parse_json
from workers.http.state import WorkerState
from workers.model.responses import EVENTS, Response, error_event

_UNDECLARED = ("", "application/x-www-form-urlencoded")
"""Content types that `curl -d` and bare clients declare for any body."""
_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")


class Predict:
    def __init__(self, worker: WorkerState) -> None:
        self._worker = worker

    async def __call__(self, context: RequestContext) -> None:
        worker = self._worker
        work = context.work()
        body = await context.read_body(worker.spec.body_limit)
        worker.queue.check()
        payload = await self._payload(context, body)
        events = EVENTS in context.header(b"accept")
        call = partial(worker.loaded.predict, payload, events)
        job = worker.queue.submit(call, work, context.key)
        with context.cancel_on_disconnect(job):
            first = await anext(job)
            if isinstance(first, Response):
                await context.respond(first.status, first.body, first.content_type, first.headers)
                return
            # The first item of a stream is its content type. Its first chunk is awaited before the
            # status is sent, so that an early failure still gets a status of its own.
            chunk = await anext(job, b"")
            if first == EVENTS:
                context.error_event = error_event
            await context.start_stream(first)
            await context.send_chunk(chunk)
            async for chunk in job:
                await context.send_chunk(chunk)
            await context.end_stream()

    async def _payload(self, context: RequestContext, body: bytes) -> Any:
        kind = context.content_type
        if self._worker.loaded.is_litapi:
            return await _form(context, body) if kind in _FORMS else parse_json(body)
        if kind == "application/json" or kind.endswith("+json"):
            return parse_json(body)
        if kind in _UNDECLARED and body.lstrip()[:1] in (b"{", b"["):
            with suppress(ApiError):
                return parse_json(body)
        return body


async def _form(context: RequestContext, body: bytes) -> Any:
    """Parse a form into Starlette's FormData, as LitServe does for a LitAPI."""

    async def replay() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        return await Request(context.scope, replay).form()
    except HTTPException as error:
        raise invalid(f"The body is not a valid form: {error.detail.rstrip('.')}.") from None
