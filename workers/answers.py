"""What a model returns or yields, as the bytes of a response."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

JSON = "application/json"
BYTES = "application/octet-stream"
TEXT = "text/plain; charset=utf-8"
LINES = "application/x-ndjson"
EVENTS = "text/event-stream"


@dataclass(frozen=True)
class Answer:
    """A whole response body."""

    body: bytes
    content_type: str = BYTES
    status: int = 200
    headers: dict[str, str] | None = None


class Text(bytes):
    """Text that leaves as it is, in a stream too."""


def as_json(value: Any) -> bytes:
    """UTF-8 JSON. Arrays and tensors become lists. Raises TypeError or ValueError otherwise."""
    return json.dumps(value, default=_plain, allow_nan=False, separators=(",", ":")).encode()


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy arrays and scalars, torch tensors
        return value.tolist()
    if hasattr(value, "model_dump"):  # pydantic
        return value.model_dump(mode="json")
    raise TypeError(f"the model returned a {type(value).__name__}, which is not JSON")


def whole(value: Any) -> Answer:
    """A returned value: bytes and str as they are, anything else as JSON."""
    if isinstance(value, Answer):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return Answer(bytes(value), BYTES)
    if isinstance(value, str):
        return Answer(value.encode(), TEXT)
    return Answer(as_json(value), JSON)


def stream(values: Iterator[Any], events: bool) -> Iterator[Any]:
    """First the content type (str), then the chunks (bytes) of what a model yields.

    Bytes leave as they are. JSON values leave one a line, or as server-sent events, whose last
    one is ``event: done``. Closing this closes ``values``.
    """
    raw: bool | None = None
    try:
        for value in values:
            is_bytes = isinstance(value, bytes | bytearray | memoryview)
            if raw is None:
                raw = is_bytes
                yield _content_type(value, raw, events)
            if is_bytes is not raw:
                raise TypeError("the model yielded both bytes and JSON values in one stream")
            yield bytes(value) if raw else _framed(as_json(value), events)
        if raw is None:
            yield EVENTS if events else LINES
        if events and not raw:
            yield b"event: done\ndata: {}\n\n"
    finally:
        close = getattr(values, "close", None)
        if close is not None:
            close()


def error_event(body: dict[str, Any]) -> bytes:
    """An error in a stream of events that has already begun."""
    return b"event: error\ndata: " + as_json(body) + b"\n\n"


def _content_type(first: Any, raw: bool, events: bool) -> str:
    if isinstance(first, Text):
        return TEXT
    if raw:
        return BYTES
    return EVENTS if events else LINES


def _framed(value: bytes, events: bool) -> bytes:
    return b"data: " + value + b"\n\n" if events else value + b"\n"
