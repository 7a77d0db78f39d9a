"""The outermost layer: gives every request its RequestContext, and logs and counts its outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from workers.errors import ApiError, ModelFailed, invalid
from workers.http.access_log import log_request
from workers.http.context import RequestContext
from workers.http.state import WorkerState
from workers.logs import log
from workers.model.contract import Cancelled, InvalidRequest
from workers.queueing.job import ClientDisconnected, DeadlinePassed, Dropped, SlowReader
from workers.queueing.queue import CrashesWorkers, QueueClosed, QueueFull

_EXIT_GRACE = 5.0
"""Seconds that requests of a worker without its device wait for its exit, on which the balancer
retries them elsewhere."""


class ContextMiddleware:
    """Pure ASGI. The context is ``scope["context"]``."""

    def __init__(self, app: ASGIApp, worker: WorkerState) -> None:
        self._app = app
        self._worker = worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"ASGI scope type is not supported: {scope['type']}; only http is")
        context = RequestContext(
            scope,
            receive,
            send,
            worker_id=self._worker.id,
            timeout=self._worker.spec.request_timeout,
        )
        scope["context"] = context
        await self._app(scope, receive, context.send)


Handler = Callable[[RequestContext], Awaitable[None]]


class ModelRoute:
    """An endpoint that the model serves. Every failure becomes an error response."""

    def __init__(self, worker: WorkerState, handler: Handler) -> None:
        self._worker = worker
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context: RequestContext = scope["context"]
        try:
            await self._handle(context)
        except ClientDisconnected as disconnected:
            context.disconnected = True
            context.dropped = disconnected
        finally:
            self._worker.metrics.ended(context)
            log_request(context)

    async def _handle(self, context: RequestContext) -> None:
        try:
            await self._handler(context)
        except ClientDisconnected:
            raise
        except (
            ApiError,
            InvalidRequest,
            Cancelled,
            Dropped,
            QueueFull,
            QueueClosed,
            CrashesWorkers,
            ModelFailed,
        ) as error:
            if isinstance(error, QueueClosed) and not context.balanced:
                await asyncio.sleep(_EXIT_GRACE)
            if context.disconnected:
                return
            await context.fail(self._to_api_error(error, context))
        except Exception as error:
            log.exception("the worker failed id=%s", context.id)
            kind = type(error).__name__
            await context.fail(ApiError(500, f"The worker failed: {kind}.", code="worker_failed"))

    def _to_api_error(self, error: Exception, context: RequestContext) -> ApiError:
        if isinstance(error, ApiError):
            if error.status >= 500:
                log.error("answered %d id=%s %s", error.status, context.id, error.message)
            return error
        if isinstance(error, InvalidRequest):
            return invalid(str(error))
        if isinstance(error, QueueFull):
            self._worker.metrics.rejected("queue_full")
            return ApiError(
                429,
                f"The queue is full ({self._worker.queue.limit} waiting); "
                f"retry after {error.retry_after} s.",
                code="queue_full",
                headers={"retry-after": str(error.retry_after)},
                try_next_worker=True,
            )
        if isinstance(error, QueueClosed):
            self._worker.metrics.rejected("closed")
            return ApiError(
                503,
                "The worker is shutting down; retry after 1 s.",
                code="worker_ending",
                headers={"retry-after": "1"},
                try_next_worker=True,
            )
        if isinstance(error, CrashesWorkers | ModelFailed):
            return self._model_error(error, context)
        return self._drop_error(error, context)

    def _drop_error(self, error: Exception, context: RequestContext) -> ApiError:
        if isinstance(error, Dropped):
            context.dropped = error
        else:  # the model or the device thread noticed the deadline before the event loop
            stage = context.job.stage if context.job is not None else "waiting"
            context.dropped = DeadlinePassed(stage)
        if isinstance(error, SlowReader):
            return ApiError(408, f"{error}.", code="slow_reader")
        return ApiError(
            504,
            f"The deadline passed while the request was {context.dropped.stage}: the limit is "
            f"{context.limit}.",
            code="deadline_passed",
            headers={"x-should-retry": "false"},
        )

    def _model_error(
        self, error: CrashesWorkers | ModelFailed, context: RequestContext
    ) -> ApiError:
        if isinstance(error, CrashesWorkers):
            return self._crash_error(error, context)
        extra = {"fields": {"id": context.id}, "traceback": error.trace}
        log.error("the model failed", extra=extra)
        return ApiError(
            500,
            f"The model failed: {error.kind}. See the worker's log, request id {context.id}.",
            code="model_failed",
        )

    def _crash_error(self, error: CrashesWorkers, context: RequestContext) -> ApiError:
        self._worker.metrics.rejected("ends_workers")
        log.error("rejected, because it crashed %d workers: id=%s", error.ended, context.id)
        return ApiError(
            500,
            f"The request crashed {error.ended} workers and is not retried. See their logs, "
            f"request id {context.id}.",
            code="request_ends_workers",
            headers={"x-should-retry": "false"},
        )
