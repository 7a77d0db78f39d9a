"""What a model returns or yields, as bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from workers.answers import as_json, stream, whole


def test_values_and_their_types() -> None:
    assert whole({"a": [1]}).body == b'{"a":[1]}'
    assert whole({"a": [1]}).content_type == "application/json"
    assert whole(b"x").content_type == "application/octet-stream"
    assert whole(bytearray(b"x")).body == b"x"
    assert whole("é").body == "é".encode()
    assert whole("é").content_type == "text/plain; charset=utf-8"
    assert whole(None).body == b"null"


def test_arrays_become_lists() -> None:
    assert json.loads(as_json({"a": np.eye(2), "b": np.int64(3)})) == {
        "a": [[1.0, 0.0], [0.0, 1.0]],
        "b": 3,
    }


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(TypeError, match="object"):
        as_json(object())
    with pytest.raises(ValueError, match="JSON"):
        as_json(float("nan"))


def test_half_a_surrogate_leaves_as_it_came() -> None:
    assert as_json("\ud800") == b'"\\ud800"'


@pytest.mark.parametrize(
    ("values", "events", "expected"),
    [
        ([{"a": 1}, 2], False, ["application/x-ndjson", b'{"a":1}\n', b"2\n"]),
        (["a"], True, ["text/event-stream", b'data: "a"\n\n', b"event: done\ndata: {}\n\n"]),
        ([b"a", b"b"], False, ["application/octet-stream", b"a", b"b"]),
        ([b"a"], True, ["application/octet-stream", b"a"]),
        ([], False, ["application/x-ndjson"]),
        ([], True, ["text/event-stream", b"event: done\ndata: {}\n\n"]),
    ],
)
def test_streams(values: list[Any], events: bool, expected: list[Any]) -> None:
    assert list(stream(iter(values), events)) == expected


def test_a_stream_is_of_one_kind() -> None:
    with pytest.raises(TypeError, match="both bytes and JSON"):
        list(stream(iter([b"a", {"b": 1}]), events=False))


def test_closing_the_stream_closes_the_model() -> None:
    closed = []

    def model() -> Iterator[int]:
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    chunks = stream(model(), events=False)
    next(chunks)
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    assert closed == [True]
