"""Raw samples: one row a request, in a CSV from which every figure can be computed again."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TextIO

OK, REFUSED, FAILED, UNFINISHED = "ok", "refused", "failed", "unfinished"
OUTCOMES = (OK, REFUSED, FAILED, UNFINISHED)


class SamplesError(ValueError):
    """Samples that cannot be used; the message names the file, the line and the column."""


@dataclass(frozen=True)
class Sample:
    """One request as its caller saw it. Times of day are unix seconds; None is "not reported"."""

    scheduled: float
    """When the request was to start. Durations count from here, also when the caller was late."""
    started: float
    """When it was sent."""
    latency_ms: float
    """Until the last byte of the answer (or until it failed, or was given up)."""
    first_byte_ms: float | None
    """Until the first byte of the answer's body: of a stream, the time to first audio."""
    status: int
    """HTTP status; 0 when there was no answer."""
    outcome: str
    """ok; refused (429: all queues full); failed; unfinished (the run ended first)."""
    error: str
    queue_ms: float | None
    """X-Queue-Time-Ms: in the worker's queue."""
    inference_ms: float | None
    """X-Inference-Time-Ms: in the model. A stream does not report it."""
    audio_seconds: float | None
    """X-Audio-Seconds, or counted from the bytes of a pcm stream."""
    real_time_factor: float | None
    """X-Real-Time-Factor: inference seconds per audio second."""
    worker: str
    """X-Worker-Id."""
    kind: str
    """speech, stream or predict."""
    text: str
    """short, medium, long; empty for predict."""
    text_length: int
    """Characters."""
    answer_bytes: int
    request_id: str
    step_users: int = 0
    """Users that the run asked for at that time."""
    step_start: float = 0.0
    step_seconds: float = 0.0
    """How long the step was to last; 0 is "until stopped"."""

    @property
    def ended(self) -> float:
        """Unix seconds of the last byte."""
        return self.scheduled + self.latency_ms / 1000

    @property
    def caller_factor(self) -> float | None:
        """Latency per audio second: the real-time factor, with all that the caller waits for."""
        if not self.audio_seconds:
            return None
        return self.latency_ms / 1000 / self.audio_seconds

    def at_step(self, users: int, start: float, seconds: float) -> Sample:
        return replace(self, step_users=users, step_start=start, step_seconds=seconds)

    def row(self) -> list[Any]:
        """Plain values in the order of COLUMNS."""
        return [getattr(self, column) for column in COLUMNS]


COLUMNS = tuple(field.name for field in fields(Sample))
_KINDS = {field.name: str(field.type) for field in fields(Sample)}


def from_row(row: Iterable[Any]) -> Sample:
    return Sample(*row)


class Writer:
    """Writes samples to an open file, header first."""

    def __init__(self, file: TextIO) -> None:
        self._writer = csv.writer(file)
        self._writer.writerow(COLUMNS)

    def write(self, sample: Sample) -> None:
        self._writer.writerow([_written(value) for value in sample.row()])


def _written(value: Any) -> Any:
    """Microseconds of everything: enough, and the same number when read again."""
    if value is None:
        return ""
    return f"{value:.6f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def read(file: Path) -> list[Sample]:
    """All samples of a CSV, as they were written. Raises SamplesError."""
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise SamplesError(f"{file}: the column {missing[0]} is missing")
            return [_parse(file, number, row) for number, row in enumerate(reader, 2)]
    except (OSError, UnicodeDecodeError) as error:
        raise SamplesError(f"{file}: cannot be read: {error}") from None


def _parse(file: Path, number: int, row: dict[str, Any]) -> Sample:
    values: dict[str, Any] = {}
    for name in COLUMNS:
        text, kind = row[name], _KINDS[name]
        try:
            if text is None:
                raise ValueError
            if kind == "str":
                values[name] = text
            elif kind == "int":
                values[name] = int(text)
            elif not text and "None" in kind:
                values[name] = None
            else:
                values[name] = float(text)
        except ValueError:
            raise SamplesError(f"{file}:{number}: {name} is {text!r}; it must be {kind}") from None
    if values["outcome"] not in OUTCOMES:
        outcomes = ", ".join(OUTCOMES)
        raise SamplesError(f"{file}:{number}: outcome is {values['outcome']!r}; one of {outcomes}")
    return Sample(**values)
