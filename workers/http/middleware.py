"""The outermost layer: gives every request its exchange, and writes down what became of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from workers.errors import ApiError, ModelFailed, invalid
from workers.http.access_log import request_line
from workers.http.context import Exchange
from workers.http.state import Worker
from workers.logs import log
from workers.model.contract import Cancelled, InvalidRequest
from workers.queueing.job import Abandoned, CallerLeft, DeadlinePassed, SlowReader
from workers.queueing.queue import Closed, EndsWorkers, Refused

_GRACE = 5.0
"""Seconds for which a lost worker's callers wait for its end, which has others answer them."""


class Front:
    """Pure ASGI. The exchange lies in the scope under ``exchange``."""

    def __init__(self, app: ASGIApp, worker: Worker) -> None:
        self._app = app
        self._worker = worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"only http is served here, not {scope['type']}")
        exchange = Exchange(
            scope,
            receive,
            send,
            worker_id=self._worker.id,
            timeout=self._worker.spec.request_timeout,
        )
        scope["exchange"] = exchange
        await self._app(scope, receive, exchange.send)


Handler = Callable[[Exchange], Awaitable[None]]


class ModelRoute:
    """An endpoint whose answer comes from the model. Every way to fail becomes an answer."""

    def __init__(self, worker: Worker, handler: Handler) -> None:
        self._worker = worker
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["exchange"]
        try:
            await self._handled(exchange)
        except CallerLeft as left:
            exchange.left = True
            exchange.dropped = left
        finally:
            self._worker.metrics.ended(exchange)
            request_line(exchange)

    async def _handled(self, exchange: Exchange) -> None:
        try:
            await self._handler(exchange)
        except CallerLeft:
            raise
        except (
            ApiError,
            InvalidRequest,
            Cancelled,
            Abandoned,
            Refused,
            Closed,
            EndsWorkers,
            ModelFailed,
        ) as error:
            if isinstance(error, Closed) and not exchange.balanced:
                await asyncio.sleep(_GRACE)
            if exchange.left:
                return
            await exchange.fail(self._answer_to(error, exchange))
        except Exception as error:
            log.exception("the worker failed id=%s", exchange.id)
            kind = type(error).__name__
            await exchange.fail(ApiError(500, f"The worker failed: {kind}.", code="worker_failed"))

    def _answer_to(self, error: Exception, exchange: Exchange) -> ApiError:
        if isinstance(error, ApiError):
            if error.status >= 500:
                log.error("answered %d id=%s %s", error.status, exchange.id, error.message)
            return error
        if isinstance(error, InvalidRequest):
            return invalid(str(error))
        if isinstance(error, Refused):
            self._worker.metrics.rejected("line_full")
            return ApiError(
                429,
                f"The worker is busy and its line of {self._worker.line.limit} is full; "
                f"retry after {error.retry_after} s.",
                code="line_full",
                headers={"retry-after": str(error.retry_after)},
                may_go_on=True,
            )
        if isinstance(error, Closed):
            self._worker.metrics.rejected("closed")
            return ApiError(
                503,
                "The worker is ending.",
                code="worker_ending",
                headers={"retry-after": "1"},
                may_go_on=True,
            )
        if isinstance(error, EndsWorkers | ModelFailed):
            return self._failure(error, exchange)
        return self._dropped(error, exchange)

    def _dropped(self, error: Exception, exchange: Exchange) -> ApiError:
        if isinstance(error, Abandoned):
            exchange.dropped = error
        else:  # the model, or the device thread, saw the deadline before the event loop did
            stage = exchange.job.stage if exchange.job is not None else "waiting"
            exchange.dropped = DeadlinePassed(stage)
        if isinstance(error, SlowReader):
            return ApiError(408, f"{error}.", code="slow_reader")
        return ApiError(
            504,
            f"The deadline passed while the request was {exchange.dropped.stage}: it may take "
            f"{exchange.limit}.",
            code="deadline_passed",
            headers={"x-should-retry": "false"},
        )

    def _failure(self, error: EndsWorkers | ModelFailed, exchange: Exchange) -> ApiError:
        if isinstance(error, EndsWorkers):
            return self._too_deadly(error, exchange)
        told = {"fields": {"id": exchange.id}, "traceback": error.trace}
        log.error("the model failed", extra=told)
        return ApiError(
            500,
            f"The model failed: {error.kind}. The worker's log has more, under {exchange.id}.",
            code="model_failed",
        )

    def _too_deadly(self, error: EndsWorkers, exchange: Exchange) -> ApiError:
        self._worker.metrics.rejected("ends_workers")
        log.error("refused, for it ended %d other workers: id=%s", error.ended, exchange.id)
        return ApiError(
            500,
            f"{error.ended} workers ended while they ran this request; it is tried on no "
            f"other. Their logs have more, under {exchange.id}.",
            code="request_ends_workers",
            headers={"x-should-retry": "false"},
        )
