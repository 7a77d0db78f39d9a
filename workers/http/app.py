"""The routes of one worker."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from workers.errors import ApiError
from workers.http.middleware import ContextMiddleware, ModelRoute
from workers.http.predict import Predict
from workers.http.state import WorkerState
from workers.http.status import Status
from workers.model.responses import as_json


def build_app(worker: WorkerState) -> ASGIApp:
    status = Status(worker)
    routes = [
        Route("/livez", status.live),
        Route("/readyz", status.ready),
        Route("/health", status.health),
        Route("/metrics", status.metrics),
        Route("/v1/models", status.models),
        Route("/v1/models/{name:path}", status.model),
        Route("/longest_request", status.longest_request),
    ]
    if worker.loaded.predicts:
        predict = ModelRoute(worker, Predict(worker))
        routes += [Route(path, predict, methods=["POST"]) for path in worker.loaded.predict_paths]
    if worker.loaded.speaks:
        # Needs numpy and soundfile, which only the extra [speech] installs.
        from workers.http.speech import Speech  # noqa: PLC0415

        routes.append(
            Route("/v1/audio/speech", ModelRoute(worker, Speech(worker)), methods=["POST"])
        )
        routes.append(Route("/v1/audio/voices", status.voices))
    known = [route.path for route in routes if "{" not in route.path]
    known.remove("/longest_request")  # internal

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _response(_routing_error(request, error, known))

    app = Starlette(
        routes=routes,
        exception_handlers={
            HTTPException: http_error,
            ApiError: _api_error,
            Exception: _internal_error,
        },
    )
    app.router.redirect_slashes = False
    return ContextMiddleware(app, worker)


def _routing_error(request: Request, error: HTTPException, known: list[str]) -> ApiError:
    path = request.url.path[:200]
    if error.status_code == 404:
        return ApiError(404, f"Not found: {path}. Available: {', '.join(known)}.", code="not_found")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return ApiError(
            405,
            f"Method not allowed on {path}: {request.method}; use {allowed}.",
            code="method_not_allowed",
            headers={"allow": allowed},
        )
    return ApiError(error.status_code, error.detail, code="http_error")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _response(error)


async def _internal_error(request: Request, error: Exception) -> Response:
    """Answer a bug of the worker itself. Its traceback is in the log."""
    kind = type(error).__name__
    return _response(ApiError(500, f"The worker failed: {kind}.", code="worker_failed"))


def _response(error: ApiError) -> Response:
    return Response(
        as_json(error.body()), error.status, error.headers, media_type="application/json"
    )
