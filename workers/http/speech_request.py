"""Parse and validate the body of ``POST /v1/audio/speech``, by OpenAI's contract."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from workers.errors import invalid, not_found
from workers.model.audio import CONTENT_TYPES, PROGRESSIVE
from workers.model.contract import SpeechRequest, Work
from workers.model.spec import DEFAULT_NAME, Spec

OPENAI_MODELS = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts")
"""Model names in the examples of client libraries: every speech model accepts them."""

OPENAI_VOICES = frozenset(
    {
        *("alloy", "ash", "ballad", "cedar", "coral", "echo", "fable"),
        *("marin", "nova", "onyx", "sage", "shimmer", "verse"),
    }
)
"""OpenAI's voices. A model with one voice accepts all of them; for one with several,
``model.voice_aliases`` maps them."""

_OWN_FIELDS = frozenset(
    {
        *("input", "model", "voice", "instructions", "response_format", "speed", "seed"),
        *("stream", "stream_format"),
    }
)
_FORMATS = ", ".join(CONTENT_TYPES)


@dataclass(frozen=True)
class SpeechOptions:
    """What to speak, and how to send it."""

    speech: SpeechRequest
    response_format: str
    events: bool
    """Server-sent events."""
    progressive: bool
    """Audio is sent while more is being generated."""


def parse_speech(body: Any, spec: Spec, voices: list[str], work: Work) -> SpeechOptions:
    """Validate a parsed body. Raises ApiError 400 or 404 with the field, its value and what is
    allowed."""
    if not isinstance(body, dict):
        raise invalid("The body is not a JSON object; send one with at least an input.")
    _check_model(body.get("model"), spec)
    response_format = _choice(body, "response_format", "mp3", (*CONTENT_TYPES, "aac"))
    if response_format == "aac":
        raise invalid(
            f"response_format 'aac' is not supported; use one of {_FORMATS}.",
            "response_format",
        )
    stream_format = _choice(body, "stream_format", None, ("audio", "sse"))
    stream = _stream(body.get("stream"), stream_format)
    speech = SpeechRequest(
        input=_input(body.get("input"), spec.input_limit),
        voice=_voice(body.get("voice"), voices, spec.voice_aliases),
        speed=_speed(body.get("speed")),
        seed=_seed(body.get("seed")),
        instructions=_instructions(body.get("instructions")),
        extra={key: value for key, value in body.items() if key not in _OWN_FIELDS},
        work=work,
    )
    return SpeechOptions(
        speech,
        response_format,
        events=stream_format == "sse",
        progressive=stream is not False
        and (stream_format is not None or response_format in PROGRESSIVE),
    )


def _stream(value: Any, stream_format: str | None) -> bool | None:
    """An extension of OpenAI's contract: false requests a complete response, whose headers have its
    length and real-time factor."""
    if value is not None and not isinstance(value, bool):
        raise invalid(f"stream must be true or false, got {_formatted(value)}.", "stream")
    if value is False and stream_format == "sse":
        raise invalid(
            "stream is false, but stream_format is 'sse', which is a stream; remove one of them.",
            "stream",
        )
    return value


def _check_model(value: Any, spec: Spec) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise invalid(f"model must be a string, got {_formatted(value)}.", "model")
    if value not in spec.names and value not in OPENAI_MODELS:
        raise not_found("model", value, spec.names)


def _input(value: Any, limit: int) -> str:
    if value is None:
        raise invalid("input is missing; it is the text to speak.", "input")
    if not isinstance(value, str):
        raise invalid(f"input must be a string, got {_formatted(value)}.", "input")
    if not value.strip():
        raise invalid("input is empty; send some text to speak.", "input")
    if len(value) > limit:
        raise invalid(
            f"input is too long: {len(value)} characters; at most {limit} are allowed.", "input"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise invalid(
            "input is not valid Unicode: it contains half of a surrogate pair.", "input"
        ) from None
    return value


def _voice(value: Any, voices: list[str], aliases: dict[str, str]) -> str:
    if isinstance(value, dict) and "id" in value:
        value = value["id"]
    if value is None:
        return voices[0]
    if not isinstance(value, str):
        raise invalid(f'voice must be a string or {{"id": …}}, got {_formatted(value)}.', "voice")
    if value in voices:
        return value
    if value in aliases:
        return aliases[value]
    if value == DEFAULT_NAME or (value in OPENAI_VOICES and len(voices) == 1):
        return voices[0]
    raise not_found("voice", value, list(dict.fromkeys((*voices, *aliases, DEFAULT_NAME))))


def _speed(value: Any) -> float:
    if value is None:
        return 1.0
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # An integer of any size can be compared with a float, but not converted to one.
    if not number or not 0.25 <= value <= 4:
        raise invalid(f"speed must be a number from 0.25 to 4, got {_formatted(value)}.", "speed")
    return float(value)


def _seed(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise invalid(f"seed must be a 64-bit integer, got {_formatted(value)}.", "seed")
    return value


def _instructions(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise invalid(f"instructions must be a string, got {_formatted(value)}.", "instructions")
    return value


def _choice(body: dict[str, Any], key: str, default: Any, allowed: tuple[str, ...]) -> Any:
    value = body.get(key)
    if value is None:
        return default
    if not isinstance(value, str) or value not in allowed:
        names = ", ".join(name for name in allowed if name != "aac")
        raise invalid(f"{key} must be one of {names}, got {_formatted(value)}.", key)
    return value


def _formatted(value: Any) -> str:
    return json.dumps(value)[:60]
