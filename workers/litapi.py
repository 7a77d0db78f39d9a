"""A LitServe ``LitAPI`` as a model, without importing litserve: its user has it installed."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Any

from workers.answers import JSON, Answer, Text, encoded, model_json
from workers.contract import InvalidRequest
from workers.errors import ApiError, LoadError
from workers.logs import log


def is_litapi(cls: type[Any]) -> bool:
    return any(
        base.__name__ == "LitAPI" and base.__module__.partition(".")[0] == "litserve"
        for base in cls.__mro__
    )


class LitModel:
    """Calls the hooks of a LitAPI in LitServe's order, one request at a time."""

    def __init__(self, api: Any) -> None:
        """Raises LoadError for what one request at a time cannot honour."""
        name = type(api).__name__
        if (getattr(api, "max_batch_size", 1) or 1) > 1:
            raise LoadError(
                f"{name} has max_batch_size={api.max_batch_size}; a worker runs one request at a "
                f"time: leave max_batch_size at 1 and run more workers"
            )
        if getattr(api, "spec", None) is not None:
            raise LoadError(
                f"{name} has a spec ({type(api.spec).__name__}); only /predict is served here: "
                f"leave spec out"
            )
        if getattr(api, "enable_async", False):
            raise LoadError(f"{name} has enable_async=True; the device runs one call at a time")
        self._api = api
        self._request_type = _request_type(api.decode_request)
        self._wants_context = {
            hook: "context" in inspect.signature(getattr(api, hook)).parameters
            for hook in ("decode_request", "predict", "encode_response")
        }

    @property
    def path(self) -> str:
        return str(getattr(self._api, "api_path", None) or "/predict")

    def setup(self, device: str) -> None:
        api = self._api
        if hasattr(api, "set_logger_queue"):
            api.set_logger_queue(_LogQueue())
        if hasattr(api, "pre_setup"):
            api.pre_setup(None)
        api.setup(device)
        api.device = device

    def health(self) -> dict[str, Any]:
        check = getattr(self._api, "health", None)
        healthy = check() if check is not None else True
        if inspect.iscoroutine(healthy):
            healthy.close()
            return {}
        return {"healthy": bool(healthy)}

    def predict(self, payload: Any) -> Any:
        context: dict[str, Any] = {}
        try:
            decoded = self._hook("decode_request", self._typed(payload), context)
            output = self._hook("predict", decoded, context)
            made = self._hook("encode_response", output, context)
            if getattr(self._api, "stream", False):
                return self._pieces(made)
        except Exception as error:
            raise _translated(error) from error
        return _answer(made)

    def _hook(self, name: str, value: Any, context: dict[str, Any]) -> Any:
        hook: Callable[..., Any] = getattr(self._api, name)
        return hook(value, context=context) if self._wants_context[name] else hook(value)

    def _typed(self, payload: Any) -> Any:
        """``decode_request(self, request: SomePydanticModel)`` gets an instance of it."""
        if self._request_type is None or isinstance(payload, self._request_type):
            return payload
        try:
            return self._request_type.model_validate(payload)
        except ValueError as error:
            raise InvalidRequest(" ".join(str(error).split())) from None

    def _pieces(self, made: Any) -> Iterator[bytes]:
        """LitServe sends what a stream yields as it is: the framing is the model's."""
        try:
            for item in made:
                piece = self._api.format_encoded_response(item)
                yield Text(encoded(piece)) if isinstance(piece, str) else piece
        except Exception as error:
            raise _translated(error) from error
        finally:
            close = getattr(made, "close", None)
            if close is not None:
                close()


class _LogQueue:
    """Where ``LitAPI.log(key, value)`` goes."""

    def put(self, item: tuple[str, Any]) -> None:
        log.info("model log %s=%s", *item)


def _request_type(hook: Callable[..., Any]) -> Any:
    try:
        kind = typing.get_type_hints(hook).get("request")
    except Exception:  # a hint that cannot be resolved says nothing
        return None
    return kind if isinstance(kind, type) and hasattr(kind, "model_validate") else None


def _answer(value: Any) -> Any:
    """LitServe answers JSON, also for a bare text, unless the hook built a response itself."""
    if isinstance(value, bytes | bytearray | memoryview | Answer):
        return value
    if hasattr(value, "status_code") and hasattr(value, "body"):
        headers = {key: text for key, text in value.headers.items() if key not in _FRAMING}
        content_type = value.headers.get("content-type", "application/octet-stream")
        return Answer(bytes(value.body), content_type, value.status_code, headers)
    return Answer(model_json(value), JSON)


_FRAMING = ("content-length", "content-type", "transfer-encoding", "connection")


def _translated(error: Exception) -> Exception:
    """FastAPI's HTTPException becomes an answer with its status."""
    status = getattr(error, "status_code", None)
    if isinstance(status, int) and 400 <= status < 600 and hasattr(error, "detail"):
        return ApiError(status, str(error.detail), code="model_refused")
    return error
