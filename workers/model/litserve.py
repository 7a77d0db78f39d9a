"""Serve a LitServe ``LitAPI`` as a model, without importing litserve: its user has it installed.

Supported: hooks that return or yield, ``async def`` ones too, with or without ``stream=True``;
batched ones, which get each request as a batch of one. Rejected at the start: a ``spec``, a custom
``loop``, hooks that cannot be called, and annotations that ``litserve_requests.py`` does not
support.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from workers.errors import ApiError, LoadError
from workers.logs import log
from workers.model.async_calls import DeviceLoop
from workers.model.responses import JSON, Response, Text, encode_text, model_json
from workers.model.signatures import check_calls

_HOOKS = {
    "setup": "device",
    "decode_request": "request",
    "predict": "x",
    "encode_response": "output",
    "batch": "inputs",
    "unbatch": "output",
}
"""Hook → the name of its first argument in messages."""


def is_litapi(cls: type[Any]) -> bool:
    return any(
        base.__name__ == "LitAPI" and base.__module__.partition(".")[0] == "litserve"
        for base in cls.__mro__
    )


class LitModel:
    """Calls the hooks of a LitAPI in LitServe's order, one request at a time."""

    def __init__(self, api: Any, loop: DeviceLoop) -> None:
        """Raises LoadError for what a worker, with one request at a time, cannot support."""
        name = type(api).__name__
        _check(api, name)
        self._api = api
        self._loop = loop
        from workers.model.litserve_requests import converter  # noqa: PLC0415 - pydantic, for a LitAPI alone

        self._convert = converter(api.decode_request, name)
        self._wants_context = {
            hook: "context" in inspect.signature(getattr(api, hook)).parameters
            for hook in _HOOKS
            if hook != "setup" and hasattr(api, hook)
        }
        self._encodes_async = _is_async(api.encode_response)
        self._batched = _is_batched(api)
        if self._batched:
            log.info("%s is written for batches: each request is a batch of one", name)
        # In LitServe's examples LitServer sets it.
        if not getattr(api, "stream", False) and _yields(api):
            api.stream = True
        self._streams = bool(getattr(api, "stream", False))

    @property
    def path(self) -> str:
        return str(getattr(self._api, "api_path", None) or "/predict")

    def setup(self, device: str) -> None:
        api = self._api
        if hasattr(api, "set_logger_queue"):
            api.set_logger_queue(_LogQueue())
        if hasattr(api, "pre_setup"):
            api.pre_setup(None)
        self._loop.resolve(api.setup(device))
        api.device = device

    def health(self) -> dict[str, Any]:
        check = getattr(self._api, "health", None)
        return {"healthy": check is None or bool(self._loop.resolve(check()))}

    def predict(self, payload: Any) -> Any:
        try:
            made = self._encode(self._convert(payload))
            if self._streams or isinstance(made, Iterator | AsyncIterator):
                return self._chunks(self._loop.resolve(made))
        except Exception as error:
            raise _translate(error) from error
        return _response(made)

    def _encode(self, payload: Any) -> Any:
        """Call the hooks up to encode_response. A batched stream has an item per batch."""
        context: dict[str, Any] = {}
        decoded = self._hook("decode_request", payload, context)
        if not self._batched:
            output = self._hook("predict", decoded, context)
            if isinstance(output, AsyncIterator) and not self._encodes_async:
                output = self._loop.resolve(output)
            return self._hook("encode_response", output, context)
        contexts = [context]
        output = self._hook("predict", self._hook("batch", [decoded], contexts), contexts)
        outputs = self._hook("unbatch", output, contexts)
        if self._streams:
            return self._hook("encode_response", outputs, contexts)
        if len(outputs) != 1:
            raise ValueError(
                f"predict or unbatch returned {len(outputs)} outputs for a batch of one; return one"
            )
        return self._hook("encode_response", outputs[0], context)

    def _hook(self, name: str, value: Any, context: Any) -> Any:
        """Call a hook and await its result; an async generator is left to the next hook."""
        hook: Callable[..., Any] = getattr(self._api, name)
        result = hook(value, context=context) if self._wants_context[name] else hook(value)
        return self._loop.resolve(result) if inspect.isawaitable(result) else result

    def _chunks(self, made: Any) -> Iterator[bytes]:
        """Yield a stream's chunks as they are, like LitServe: the framing is the model's."""
        try:
            for item in made:
                one = item[0] if self._batched else item
                chunk = self._api.format_encoded_response(one)
                yield Text(encode_text(chunk)) if isinstance(chunk, str) else chunk
        except Exception as error:
            raise _translate(error) from error
        finally:
            close = getattr(made, "close", None)
            if close is not None:
                close()


def _check(api: Any, name: str) -> None:
    if getattr(api, "spec", None) is not None:
        raise LoadError(
            f"{name}.spec is not supported: {type(api.spec).__name__}; remove it, a worker serves "
            "/predict"
        )
    if getattr(api, "_loop", "auto") != "auto":
        raise LoadError(
            f"{name}.loop is not supported: {type(api._loop).__name__}; remove it, a worker runs "
            "one request at a time"
        )
    if not _overrides(api, "predict"):
        raise LoadError(f"{name} has no predict(x); define it")
    for hook, argument in _HOOKS.items():
        check_calls(api, name, {hook: (argument,)}, keyword="context")


def _is_batched(api: Any) -> bool:
    """Whether predict gets batches. LitServe itself only warns where batch and unbatch are defined
    and max_batch_size is 1."""
    if (getattr(api, "max_batch_size", 1) or 1) > 1:
        return True
    return _overrides(api, "batch") or _overrides(api, "unbatch")


def _yields(api: Any) -> bool:
    """Whether encode_response yields a stream for every request."""
    if _overrides(api, "encode_response"):
        return _is_generator(api.encode_response)
    return _is_generator(api.predict)


def _is_generator(hook: Callable[..., Any]) -> bool:
    return inspect.isgeneratorfunction(hook) or inspect.isasyncgenfunction(hook)


def _is_async(hook: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(hook) or inspect.isasyncgenfunction(hook)


def _overrides(api: Any, hook: str) -> bool:
    """Whether the hook is the user's rather than LitAPI's own."""
    module: str = getattr(getattr(type(api), hook, None), "__module__", "") or ""
    return module != "litserve.api"


class _LogQueue:
    """Receives ``LitAPI.log(key, value)``."""

    def put(self, item: tuple[str, Any]) -> None:
        log.info("model log %s=%s", *item)


def _response(value: Any) -> Any:
    """Convert a result to a Response: JSON, also for a str, like LitServe, unless it is bytes or a
    response already."""
    if isinstance(value, bytes | bytearray | memoryview | Response):
        return value
    if hasattr(value, "status_code") and hasattr(value, "body"):
        headers = {key: text for key, text in value.headers.items() if key not in _FRAMING}
        content_type = value.headers.get("content-type", "application/octet-stream")
        return Response(bytes(value.body), content_type, value.status_code, headers)
    return Response(model_json(value), JSON)


_FRAMING = ("content-length", "content-type", "transfer-encoding", "connection")


def _translate(error: Exception) -> Exception:
    """Turn FastAPI's HTTPException into an ApiError with its status."""
    status = getattr(error, "status_code", None)
    if isinstance(status, int) and 400 <= status < 600 and hasattr(error, "detail"):
        return ApiError(status, str(error.detail), code="model_refused")
    return error
