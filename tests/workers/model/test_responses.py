"""Encoding what a model returns or yields."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from workers.errors import ApiError
from workers.model.responses import as_json, complete, stream


def test_values_and_their_types() -> None:
    assert complete({"a": [1]}).body == b'{"a":[1]}'
    assert complete({"a": [1]}).content_type == "application/json"
    assert complete(b"x").content_type == "application/octet-stream"
    assert complete(bytearray(b"x")).body == b"x"
    assert complete("é").body == "é".encode()
    assert complete("é").content_type == "text/plain; charset=utf-8"
    assert complete(None).body == b"null"


def test_arrays_become_lists() -> None:
    assert json.loads(as_json({"a": np.eye(2), "b": np.int64(3)})) == {
        "a": [[1.0, 0.0], [0.0, 1.0]],
        "b": 3,
    }


def test_values_beyond_json_are_rejected() -> None:
    with pytest.raises(TypeError, match="object"):
        as_json(object())
    with pytest.raises(ValueError, match="JSON"):
        as_json(float("nan"))


def test_half_a_surrogate_in_json_is_escaped() -> None:
    assert as_json("\ud800") == b'"\\ud800"'


class Picture:
    """Looks like one of PIL's."""

    def save(self, file: Any) -> None: ...


Picture.__module__ = "PIL.Image"
RING: list[Any] = []
RING.append(RING)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"tags": {"a"}}, "a set at ['tags'], which JSON cannot carry: return a list."),
        ([{"b": b"x"}], "bytes at [0]['b'], which JSON cannot carry: return the bytes alone, or b"),
        (float("nan"), "nan, which JSON cannot carry: return None or a finite number."),
        ({"a": [1, float("-inf")]}, "-inf at ['a'][1], which JSON cannot carry"),
        ({"a": np.array([[1.0, np.inf]])}, "inf at ['a'][0][1], which JSON cannot carry"),
        ({(1, 2): 3}, "a dict with a tuple as a key: use strings."),
        ({"p": Picture()}, "a PIL image at ['p'], which JSON cannot carry: save it as PNG"),
        ({"x": object()}, "an object at ['x'], which JSON cannot carry: return numbers, strings"),
        (RING, "a value that is nested too deeply, or within itself"),
        (10**5000, "what JSON cannot carry: Exceeds the limit (4300 digits)"),
        ("a\ud800", "a str with half of a surrogate pair at character 1"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_unsendable_part_is_named_with_its_location_and_remedy(value: Any, words: str) -> None:
    with pytest.raises(ApiError) as error:
        complete(value)
    assert error.value.status == 500
    assert error.value.message.startswith(f"The model returned {words}")
    if not isinstance(value, str):
        with pytest.raises(ApiError) as error:
            list(stream(iter([value]), events=False))
        assert error.value.message.startswith(f"The model returned {words}")


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


def test_stream_with_mixed_kinds_is_rejected() -> None:
    with pytest.raises(ApiError, match="both bytes and JSON"):
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
