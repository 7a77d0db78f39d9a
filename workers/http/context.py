"""One request and its response: id, deadline, body, headers, and whether the client is still
connected."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from workers.errors import ApiError, invalid
from workers.model.contract import Work
from workers.model.responses import as_json
from workers.queueing.crash_guard import CrashGuard
from workers.queueing.deadline import TimeLimit
from workers.queueing.job import DeadlinePassed, Dropped, Job

DISCONNECT_CHECK_DELAY = 0.02
"""Seconds before a task starts to watch for a disconnect, so that short jobs do not pay for one."""

MAX_CHUNK_BYTES = 32 * 1024
"""Bytes of a stream that are sent at once, so that a slow reader is noticed within a large item."""

_REFUSALS = "/.gpufarm/"
"""Prefix of the balancer's own error pages, used when no worker accepts: plus 429 or 503."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_NOT_A_TOKEN = re.compile(r"[^A-Za-z0-9_-]")


class RequestContext:
    """Wraps ASGI's receive and send, and records what the access log and the metrics need."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, *, worker_id: str, timeout: float
    ) -> None:
        self.began = time.perf_counter()
        self.scope = scope
        self.receive = receive
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers = dict(scope["headers"])
        self.limit = TimeLimit(timeout, self.header(b"x-request-start"))
        self.id = self._request_id()
        self.status: int | None = None
        """The status that was sent; None when nothing was."""
        self.cut: int | None = None
        """The status that would have been sent, had the stream not begun."""
        self.first_byte: float | None = None
        """Seconds from arrival to the first byte of the body."""
        self.job: Job | None = None
        self.audio_seconds: float | None = None
        self.streamed = False
        self.dropped: Dropped | None = None
        self.error_event: Callable[[dict[str, Any]], bytes] | None = None
        """Encodes an error as an event of a stream that has already begun; None where it cannot."""
        self.disconnected = False
        self.complete = False
        self.unread = False
        """Whether the stream was aborted while its reader took nothing."""
        self._sending: asyncio.Timeout | None = None
        self._send = send
        self._worker_headers = [
            (b"x-request-id", self.id.encode()),
            (b"x-worker-id", worker_id.encode()),
        ]

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def header(self, name: bytes) -> str:
        """Empty when the request lacks it."""
        return str(self.headers.get(name, b"").decode("latin-1"))

    @property
    def key(self) -> str:
        """The balancer's id of this request, the same on every worker that it tries."""
        return CrashGuard.key(self.header(b"x-farm-request"))

    @property
    def balanced(self) -> bool:
        """Whether it came through the balancer, which retries a rejected request on another worker,
        and whose clients are the public."""
        return b"x-farm-request" in self.headers

    @property
    def content_type(self) -> str:
        return self.header(b"content-type").partition(";")[0].strip().lower()

    def work(self) -> Work:
        """Return the work of this request, with its deadline.

        Raises ApiError for an invalid header, and DeadlinePassed where other workers have used up
        its time.
        """
        requested = self.header(b"x-request-timeout")
        if requested:
            self.limit.shorten(requested)
        if not self.limit.remaining:
            raise DeadlinePassed("waiting")
        return Work(self.limit.deadline)

    async def read_body(self, limit: int) -> bytes:
        """Return the body. Raises ApiError 413 beyond ``limit`` bytes, 408 when it is too late, and
        415 when it is compressed."""
        _check_encoding(self.header(b"content-encoding"))
        length = self.header(b"content-length")
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        try:
            async with asyncio.timeout(self.limit.remaining):
                message = await self.receive()
                if message["type"] == "http.request" and not message.get("more_body"):
                    return _bounded(bytes(message.get("body", b"")), limit)
                return await self._read_rest(message, limit)
        except TimeoutError:
            raise ApiError(
                408, f"The body did not arrive in time: the limit is {self.limit}.", code="timeout"
            ) from None

    async def _read_rest(self, message: Message, limit: int) -> bytes:
        body = bytearray()
        while True:
            if message["type"] == "http.disconnect":
                self.disconnected = True
                raise ApiError(499, "The client disconnected.", code="client_disconnected")
            body += message.get("body", b"")
            if len(body) > limit:
                raise _too_large(limit)
            if not message.get("more_body"):
                return bytes(body)
            message = await self.receive()

    @contextlib.contextmanager
    def cancel_on_disconnect(self, job: Job) -> Iterator[None]:
        """Cancel ``job`` when the client disconnects, and when its response fails on the way, as in
        an encoder. Costs a task only for jobs that take a while."""
        self.job = job
        job.on_dropped = self._interrupt
        tasks: list[asyncio.Task[None]] = []
        loop = asyncio.get_running_loop()
        timer = loop.call_later(
            DISCONNECT_CHECK_DELAY,
            lambda: tasks.append(loop.create_task(self._wait_for_disconnect(job))),
        )
        try:
            yield
        finally:
            job.on_dropped = None
            job.cancel()
            timer.cancel()
            for task in tasks:
                task.cancel()

    async def _wait_for_disconnect(self, job: Job) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        if not self.complete:
            self.disconnected = True
            job.cancel()

    def _interrupt(self) -> None:
        """Stop waiting for a reader that takes nothing: its job was dropped."""
        if self._sending is not None:
            self.unread = True
            self._sending.reschedule(asyncio.get_running_loop().time())

    async def send(self, message: Message) -> None:
        """ASGI's send for the routes: adds this worker's headers, notes status and first byte."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self._worker_headers]}
        else:
            if self.first_byte is None and message.get("body"):
                self.first_byte = self.seconds
            self.complete = not message.get("more_body")
        await self._send(message)

    async def respond(
        self, status: int, body: bytes, content_type: str, headers: dict[str, str] | None = None
    ) -> None:
        """Send a complete response, the model's or the worker's.

        On a 502 the balancer would try the next worker, after the model has done its work: that
        status is the worker's own signal (see ``fail``), so a model's 502 is sent as 500. Headers
        with which a model could control the balancer are dropped. A 500 asks client libraries not
        to retry: what fails here fails on the next worker too.
        """
        if status == 502:
            status = 500
        kept = {
            name: value
            for name, value in (headers or {}).items()
            if not name.lower().startswith("x-accel-")
        }
        if status == 500:
            kept.setdefault("x-should-retry", "false")
        await self._start(status, content_type, {"content-length": str(len(body)), **kept})
        await self.send({"type": "http.response.body", "body": body})

    async def fail(self, error: ApiError) -> None:
        """Respond with ``error``; when the response has already begun, cut it off.

        A response that is cut off is not terminated properly, so its client sees that something is
        missing; a stream of events ends with the error as its last one.

        A rejection that another worker may not share is sent to the balancer as 502, on which it
        tries the next worker. If there is none, it responds with its own page for the intended
        status.
        """
        if self.status is not None:
            self.cut = error.status
            if self.error_event is not None and not self.unread:
                await self.send_chunk(self.error_event(error.body()))
                await self.end_stream()
            return
        body = as_json(error.body())
        if not (error.try_next_worker and self.balanced):
            await self.respond(error.status, body, "application/json", error.headers)
            return
        redirect = {"x-accel-redirect": f"{_REFUSALS}{error.status}"}
        headers = {"content-length": str(len(body)), **error.headers, **redirect}
        await self._start(502, "application/json", headers)
        await self.send({"type": "http.response.body", "body": body})
        self.status = error.status  # for the log and the metrics

    async def start_stream(self, content_type: str, headers: dict[str, str] | None = None) -> None:
        self.streamed = True
        await self._start(
            200,
            content_type,
            {"x-accel-buffering": "no", "cache-control": "no-cache", **(headers or {})},
        )

    async def send_chunk(self, body: bytes) -> None:
        """Send a chunk of a stream, as fast as its reader takes it.

        Raises the reason if the job was dropped meanwhile: its deadline, a disconnect, or a slow
        reader.
        """
        try:
            async with asyncio.timeout(None) as self._sending:
                for start in range(0, len(body), MAX_CHUNK_BYTES):
                    piece = body[start : start + MAX_CHUNK_BYTES]
                    await self.send(
                        {"type": "http.response.body", "body": piece, "more_body": True}
                    )
                    if self.job is not None:
                        self.job.delivered((start + len(piece)) / len(body))
        except TimeoutError:
            if self.job is None or self.job.error is None:
                raise
            raise self.job.error from None
        finally:
            self._sending = None

    async def end_stream(self) -> None:
        await self.send({"type": "http.response.body", "body": b""})

    async def _start(self, status: int, content_type: str, headers: dict[str, str]) -> None:
        pairs = [(b"content-type", content_type.encode("latin-1"))]
        pairs += [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        pairs += self._timing_headers()
        await self.send({"type": "http.response.start", "status": status, "headers": pairs})

    def _timing_headers(self) -> list[tuple[bytes, bytes]]:
        job = self.job
        if job is None:
            return []
        queue = f"{1000 * job.queue_seconds:.3f}".encode()
        pairs = [(b"x-queue-time-ms", queue)]
        stages = [b"queue;dur=" + queue]
        if not self.streamed and job.ended is not None:
            pairs.append((b"x-inference-time-ms", b"%.3f" % (1000 * job.service_seconds)))
            for name, seconds in job.work.stages.items():
                token = _NOT_A_TOKEN.sub("_", name).encode()
                stages.append(b"%b;dur=%.3f" % (token, 1000 * seconds))
        return [*pairs, (b"server-timing", b", ".join(stages))]

    def _request_id(self) -> str:
        given = self.header(b"x-request-id")
        return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def parse_json(body: bytes) -> Any:
    """Parse a body. Raises ApiError 400, also for NaN, Infinity and numbers beyond a float."""
    try:
        # json.loads itself would accept surrogates that are not valid UTF-8.
        text = body.decode(json.detect_encoding(body))
        if not _MAYBE_HUGE.search(text):
            return json.loads(text, parse_constant=_reject_constant)
        return json.loads(
            text, parse_constant=_reject_constant, parse_float=_float, parse_int=_integer
        )
    except RecursionError:
        raise invalid("The body is nested too deeply.") from None
    except ValueError as error:
        raise invalid(f"The body is not JSON: {error}.") from None


_MAYBE_HUGE = re.compile(r"(?<![0-9])[0-9]{200}|[eE]\+?0*[1-9][0-9]{2}")
"""Matches, cheaply, every body with a number beyond a float's range. Only then is every number
checked one by one, which is slow."""


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {_shortened(text)} is beyond the range of a 64-bit float")
    return value


def _integer(text: str) -> int:
    _float(text)
    return int(text)


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:20]}… of {len(text)} characters"


def _check_encoding(value: str) -> None:
    if value.strip().lower() not in ("", "identity"):
        raise ApiError(
            415,
            f"Content-Encoding is not supported: {value[:40]!r}; send the body uncompressed.",
            code="content_encoding_unsupported",
            param="Content-Encoding",
            headers={"accept-encoding": "identity"},
        )


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _bounded(body: bytes, limit: int) -> bytes:
    if len(body) > limit:
        raise _too_large(limit)
    return body


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"The body is too large: the limit is {limit} bytes.", code="body_too_large"
    )
