"""``POST /predict``: JSON or bytes in; a value, bytes, or a stream of either out."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from workers.errors import ApiError, invalid
from workers.http.context import Exchange, parse_json
from workers.http.state import Worker
from workers.model.responses import EVENTS, Answer, error_event

_UNDECLARED = ("", "application/x-www-form-urlencoded")
"""What `curl -d` and bare clients say of any body, whatever it is."""
_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")


class Predict:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def __call__(self, exchange: Exchange) -> None:
        worker = self._worker
        work = exchange.work()
        body = await exchange.read_body(worker.spec.body_limit)
        worker.line.check()
        payload = await self._payload(exchange, body)
        events = EVENTS in exchange.header(b"accept")
        call = partial(worker.served.predict, payload, events)
        job = worker.line.submit(call, work, exchange.key)
        with exchange.watching(job):
            first = await anext(job)
            if isinstance(first, Answer):
                await exchange.answer(first.status, first.body, first.content_type, first.headers)
                return
            # The first item of a stream is its type; its first chunk has to exist before a status
            # is sent, so that an early failure still gets its own.
            chunk = await anext(job, b"")
            if first == EVENTS:
                exchange.error_event = error_event
            await exchange.start_stream(first)
            await exchange.send_chunk(chunk)
            async for chunk in job:
                await exchange.send_chunk(chunk)
            await exchange.end_stream()

    async def _payload(self, exchange: Exchange, body: bytes) -> Any:
        kind = exchange.content_type
        if self._worker.served.is_litapi:
            return await _form(exchange, body) if kind in _FORMS else parse_json(body)
        if kind == "application/json" or kind.endswith("+json"):
            return parse_json(body)
        if kind in _UNDECLARED and body.lstrip()[:1] in (b"{", b"["):
            with suppress(ApiError):
                return parse_json(body)
        return body


async def _form(exchange: Exchange, body: bytes) -> Any:
    """What LitServe gives a LitAPI for a form: Starlette's FormData."""

    async def replay() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        return await Request(exchange.scope, replay).form()
    except HTTPException as error:
        raise invalid(f"The body is not a form: {error.detail.rstrip('.')}.") from None
