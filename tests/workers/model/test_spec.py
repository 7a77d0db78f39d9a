"""Validation of a worker's spec file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workers.errors import LoadError
from workers.model.spec import Spec, parse_spec, read_spec


def test_minimal_spec_has_defaults() -> None:
    spec = parse_spec({"model": {"target": "a:B"}})
    assert spec == Spec(target="a:B")
    assert (spec.queue_size, spec.request_timeout, spec.body_limit) == (8, 60.0, 64 * 1024 * 1024)


def test_every_key_is_read(tmp_path: Path) -> None:
    document = {
        "model": {
            "target": "a:B",
            "args": {"x": 1},
            "name": "demo",
            "aliases": ["tts-1"],
            "voice_aliases": {"alloy": "anna"},
        },
        "path": [str(tmp_path)],
        "queue_size": 0,
        "request_timeout": 5,
        "body_limit": 10,
        "input_limit": 20,
        "cache_dir": str(tmp_path / "cache"),
        "log_format": "json",
        "created": 1_700_000_000,
    }
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(document))
    assert read_spec(file) == Spec(
        target="a:B",
        args={"x": 1},
        name="demo",
        aliases=("tts-1",),
        voice_aliases={"alloy": "anna"},
        path=(tmp_path,),
        queue_size=0,
        request_timeout=5.0,
        body_limit=10,
        input_limit=20,
        cache_dir=tmp_path / "cache",
        log_format="json",
        created=1_700_000_000,
    )


def test_default_is_always_a_name() -> None:
    assert Spec(target="a:B", name="demo", aliases=("x", "demo")).names == ["demo", "x", "default"]
    assert Spec(target="a:B", name="default").names == ["default"]


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([], "the document must be a JSON object, got []"),
        ({}, "model.target is missing"),
        ({"model": {"target": ""}}, 'model.target must be a non-empty string, got ""'),
        ({"model": {"target": 3}}, "model.target must be a non-empty string, got 3"),
        (
            {"model": {"target": "a:B", "arg": {}}},
            'unknown key "arg" in model; did you mean "args"',
        ),
        ({"model": {"target": "a:B"}, "zzz": 1}, 'unknown key "zzz" in the document; known keys'),
        (
            {"model": {"target": "a:B", "args": []}},
            "model.args must be an object of keyword arguments, got []",
        ),
        (
            {"model": {"target": "a:B"}, "queue_size": -1},
            "queue_size must be an integer of at least 0, got -1",
        ),
        (
            {"model": {"target": "a:B"}, "queue_size": True},
            "queue_size must be an integer of at least 0, got true",
        ),
        (
            {"model": {"target": "a:B"}, "request_timeout": 0},
            "request_timeout must be a positive number of seconds, got 0",
        ),
        (
            {"model": {"target": "a:B"}, "request_timeout": "1"},
            'positive number of seconds, got "1"',
        ),
        ({"model": {"target": "a:B"}, "path": "x"}, 'path must be a list of strings, got "x"'),
        (
            {"model": {"target": "a:B", "aliases": [1]}},
            "model.aliases[0] must be a non-empty string, got 1",
        ),
        (
            {"model": {"target": "a:B", "voice_aliases": ["x"]}},
            'model.voice_aliases must be an object of strings, got ["x"]',
        ),
        (
            {"model": {"target": "a:B", "voice_aliases": {"alloy": 3}}},
            "model.voice_aliases.alloy must be a non-empty string, got 3",
        ),
    ],
)
def test_invalid_spec_names_the_key(document: Any, words: str) -> None:
    with pytest.raises(LoadError) as error:
        parse_spec(document)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"{", "not JSON"), (b"\xff", "not UTF-8"), (b"[" * 100_000, "not JSON")],
)
def test_file_that_is_not_json_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "spec.json"
    file.write_bytes(content)
    with pytest.raises(LoadError, match=words) as error:
        read_spec(file)
    assert str(file) in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="No such file"):
        read_spec(tmp_path / "none.json")
