"""The body of a speech request."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from workers.errors import ApiError
from workers.http.speech_request import SpeechOptions, parse_speech
from workers.model.contract import Work
from workers.model.spec import Spec

SPEC = Spec(target="a:B", name="demo", aliases=("mine",), input_limit=100)
VOICES = ["anna", "bert"]


def parsed(**body: Any) -> SpeechOptions:
    return parse_speech({"input": "hello", **body}, SPEC, VOICES, Work())


def test_only_the_input_is_required() -> None:
    wanted = parsed()
    assert wanted.speech.input == "hello"
    assert wanted.speech.voice == "anna"
    assert wanted.speech.speed == 1.0
    assert wanted.speech.seed is None
    assert wanted.response_format == "mp3"
    assert not wanted.events
    assert wanted.progressive


@pytest.mark.parametrize(
    "model", ["demo", "mine", "default", None, "tts-1", "tts-1-hd", "gpt-4o-mini-tts"]
)
def test_names_of_the_model(model: str | None) -> None:
    parsed(model=model)


@pytest.mark.parametrize(
    ("voice", "expected"),
    [("bert", "bert"), ("default", "anna"), (None, "anna"), ({"id": "bert"}, "bert")],
)
def test_names_of_voices(voice: Any, expected: str) -> None:
    assert parsed(voice=voice).speech.voice == expected


def voice_of(voice: str, voices: list[str], **aliases: str) -> str:
    spec = replace(SPEC, voice_aliases=aliases)
    return parse_speech({"input": "x", "voice": voice}, spec, voices, Work()).speech.voice


def test_single_voice_accepts_all_openai_voices() -> None:
    assert voice_of("alloy", ["slt"]) == "slt"
    assert voice_of("marin", ["slt"]) == "slt"
    with pytest.raises(ApiError) as error:
        voice_of("zoe", ["slt"])
    assert error.value.status == 404


def test_several_voices_are_mapped_by_voice_aliases() -> None:
    assert voice_of("alloy", VOICES, alloy="bert") == "bert"
    assert voice_of("narrator", VOICES, narrator="bert") == "bert"
    assert voice_of("alloy", ["slt", "alloy"]) == "alloy"
    with pytest.raises(ApiError, match="Available: anna, bert, nova, default"):
        voice_of("alloy", VOICES, nova="anna")


def test_voice_named_default_is_used() -> None:
    wanted = parse_speech({"input": "x", "voice": "default"}, SPEC, ["a", "default"], Work())
    assert wanted.speech.voice == "default"


def test_which_requests_are_streamed() -> None:
    for name in ("pcm", "wav", "mp3", "opus"):
        assert parsed(response_format=name).progressive
        assert parsed(response_format=name, stream=True).progressive
        assert not parsed(response_format=name, stream=False).progressive
        assert not parsed(response_format=name, stream=False, stream_format="audio").progressive
    assert not parsed(response_format="flac").progressive
    assert not parsed(response_format="flac", stream=True).progressive
    assert parsed(response_format="flac", stream_format="sse").progressive
    assert parsed(stream_format="sse").events


def test_unknown_fields_reach_the_model() -> None:
    wanted = parsed(temperature=0.5, seed=3, instructions="softly")
    assert wanted.speech.extra == {"temperature": 0.5}
    assert wanted.speech.seed == 3
    assert wanted.speech.instructions == "softly"


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({"input": None}, 400, "input", "missing"),
        ({"input": ""}, 400, "input", "empty"),
        ({"input": " \n"}, 400, "input", "empty"),
        ({"input": 3}, 400, "input", "3"),
        ({"input": "x" * 101}, 400, "input", "too long: 101 characters; at most 100"),
        ({"input": "\ud800"}, 400, "input", "surrogate"),
        ({"model": "gpt"}, 404, "model", "demo, mine, default"),
        ({"model": 3}, 400, "model", "3"),
        ({"voice": "zoe"}, 404, "voice", "anna, bert, default"),
        ({"voice": {"name": "anna"}}, 400, "voice", "id"),
        ({"speed": 5}, 400, "speed", "0.25 to 4"),
        ({"speed": 10**400}, 400, "speed", "0.25 to 4"),
        ({"speed": -(10**400)}, 400, "speed", "0.25 to 4"),
        ({"speed": float("inf")}, 400, "speed", "0.25 to 4"),
        ({"speed": float("nan")}, 400, "speed", "0.25 to 4"),
        ({"speed": True}, 400, "speed", "0.25 to 4"),
        ({"speed": "1"}, 400, "speed", "0.25 to 4"),
        ({"seed": 1.5}, 400, "seed", "64-bit integer"),
        ({"seed": 2**64}, 400, "seed", "64-bit integer"),
        ({"response_format": "ogg"}, 400, "response_format", "mp3, opus, flac, wav, pcm"),
        ({"response_format": "aac"}, 400, "response_format", "mp3, opus, flac, wav, pcm"),
        ({"stream_format": "x"}, 400, "stream_format", "audio, sse"),
        ({"instructions": 1}, 400, "instructions", "string"),
        ({"stream": "no"}, 400, "stream", "true or false"),
        ({"stream": False, "stream_format": "sse"}, 400, "stream", "'sse', which is a stream"),
    ],
)
def test_validation_errors_name_field_and_remedy(
    body: dict[str, Any], status: int, param: str, words: str
) -> None:
    with pytest.raises(ApiError) as error:
        parsed(**body)
    assert (error.value.status, error.value.param) == (status, param)
    assert words in error.value.message


@pytest.mark.parametrize("body", [[], None, "hello", 3])
def test_body_that_is_not_an_object(body: Any) -> None:
    with pytest.raises(ApiError, match="not a JSON object"):
        parse_speech(body, SPEC, VOICES, Work())
