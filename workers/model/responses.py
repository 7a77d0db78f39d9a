"""Encode what a model returns or yields as the bytes of a response."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from workers.errors import ApiError
from workers.model.unsendable import plain, unsendable

JSON = "application/json"
BYTES = "application/octet-stream"
TEXT = "text/plain; charset=utf-8"
LINES = "application/x-ndjson"
EVENTS = "text/event-stream"


@dataclass(frozen=True)
class Response:
    """A complete response."""

    body: bytes
    content_type: str = BYTES
    status: int = 200
    headers: dict[str, str] | None = None


class Text(bytes):
    """Text that is sent as it is, in a stream too."""


def as_json(value: Any) -> bytes:
    """Encode as UTF-8 JSON, arrays and tensors as lists. Raises TypeError or ValueError."""
    return json.dumps(value, default=plain, allow_nan=False, separators=(",", ":")).encode()


def model_json(value: Any) -> bytes:
    """Encode what a model returned. Raises ApiError 500 that tells the model's author what JSON
    cannot carry, and what to return instead."""
    try:
        return as_json(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise _unsendable_error(unsendable(value, error)) from None


def encode_text(text: str) -> bytes:
    """Encode a str that a model returned. Raises ApiError 500 for half of a surrogate pair."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise _unsendable_error(
            f"a str with half of a surrogate pair at character {error.start}, which UTF-8 cannot "
            'carry: return text.encode("utf-8", "replace"), or correct its source'
        ) from None


def _unsendable_error(what: str) -> ApiError:
    return ApiError(
        500,
        f"The model returned {what}.",
        code="answer_not_sendable",
        headers={"x-should-retry": "false"},
    )


def complete(value: Any) -> Response:
    """Turn a returned value into a Response: bytes and str as they are, anything else as JSON.

    Raises ApiError 500.
    """
    if isinstance(value, Response):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return Response(bytes(value), BYTES)
    if isinstance(value, str):
        return Response(encode_text(value), TEXT)
    return Response(model_json(value), JSON)


def stream(values: Iterator[Any], events: bool) -> Iterator[Any]:
    """Yield first the content type (str), then the chunks (bytes) of what a model yields.

    Bytes are sent as they are, JSON values one per line, or as server-sent events, the last of
    which is ``event: done``. Closing this closes ``values``.
    """
    raw: bool | None = None
    try:
        for value in values:
            is_bytes = isinstance(value, bytes | bytearray | memoryview)
            if raw is None:
                raw = is_bytes
                yield _content_type(value, raw, events)
            if is_bytes is not raw:
                raise _unsendable_error(
                    "both bytes and JSON values in one stream, which has one content type: yield "
                    "one kind only"
                )
            yield bytes(value) if raw else _frame(model_json(value), events)
        if raw is None:
            yield EVENTS if events else LINES
        if events and not raw:
            yield b"event: done\ndata: {}\n\n"
    finally:
        close = getattr(values, "close", None)
        if close is not None:
            close()


def error_event(body: dict[str, Any]) -> bytes:
    """Encode an error as an event of a stream that has already begun."""
    return b"event: error\ndata: " + as_json(body) + b"\n\n"


def _content_type(first: Any, raw: bool, events: bool) -> str:
    if isinstance(first, Text):
        return TEXT
    if raw:
        return BYTES
    return EVENTS if events else LINES


def _frame(value: bytes, events: bool) -> bytes:
    return b"data: " + value + b"\n\n" if events else value + b"\n"
