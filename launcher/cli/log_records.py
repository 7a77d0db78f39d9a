"""Parse lines of any process's log as records with a time, so that several logs can be merged.

Known formats are our own, those of supervisord and of Python's logging ("2026-11-25 00:00:00,123"),
of nginx ("2026/11/25 00:00:00") and JSON with a "time". Times without a zone are local ones. A line
without a time belongs to the record above it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

_STAMP = re.compile(
    r"\[?(?P<date>\d{4}([-/])\d\d\2\d\d)[T ](?P<clock>\d\d:\d\d:\d\d)(?:[.,](?P<fraction>\d{1,9}))?"
    r" ?(?P<zone>Z|[+-]\d\d:?\d\d)?\]?(?:[\s:]+(?P<rest>.*)|$)"
)
_LEVEL = re.compile(r"\[?(?P<level>[A-Za-z]+)\]?(?:[\s:]+(?P<rest>.*)|$)")
_LEVELS = {
    **{name: name for name in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")},
    **{"NOTICE": "INFO", "WARN": "WARNING", "CRIT": "CRITICAL"},
    **{"ALERT": "CRITICAL", "EMERG": "CRITICAL"},
}
TRACEBACK = "Traceback (most recent call last):"
_KEYS = ("time", "level", "process", "message", "traceback")


@dataclass(frozen=True)
class Record:
    """One record of a process's log."""

    time: float
    """Unix seconds; without a time of its own, that of the record before it."""
    process: str
    message: str
    level: str = "INFO"
    traceback: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    text: tuple[str, ...] = ()
    """Formatted as text: one line or, with a traceback, several."""

    def to_json(self) -> str:
        """Format as one line: time, level, process, message, the fields, and any traceback."""
        body = {
            "time": stamp(self.time),
            "level": self.level,
            "process": self.process,
            "message": self.message,
            **self.fields,
        }
        if self.traceback:
            body["traceback"] = self.traceback
        return json.dumps(body, ensure_ascii=False)


def stamp(seconds: float) -> str:
    """UTC, ISO 8601 with milliseconds."""
    timestamp = datetime.fromtimestamp(seconds, UTC)
    return f"{timestamp:%Y-%m-%dT%H:%M:%S}.{timestamp.microsecond // 1000:03d}Z"


def parse_records(process: str, lines: Sequence[str], last: float, fallback: float) -> list[Record]:
    """The records of consecutive lines of one log; their times never fall.

    ``last``: the time of the record before them, 0 where there was none. Then lines before the
    first time get that one, or ``fallback`` where there is none.
    """
    parsed = [_parse_line(process, line) for line in lines]
    first = next((record.time for record in parsed if record is not None), fallback)
    now = last or first
    records: list[Record] = []
    in_traceback = False
    for line, record in zip(lines, parsed, strict=True):
        if record is not None:
            now = max(now, record.time)
            records.append(replace(record, time=now))
            in_traceback = False
            continue
        in_traceback = in_traceback or line.startswith(TRACEBACK)
        if in_traceback and records:
            records[-1] = _with_line(records[-1], line)
        else:
            records.append(Record(now, process, line, text=(line,)))
    return records


def _with_line(record: Record, line: str) -> Record:
    """Append a line to a record's traceback."""
    whole = f"{record.traceback}\n{line}" if record.traceback else line
    return replace(record, traceback=whole, text=(*record.text, line))


def _parse_line(process: str, line: str) -> Record | None:
    """Parse a line that has a time; None for any other."""
    if line.startswith("{"):
        return _parse_json(process, line)
    match = _STAMP.match(line)
    timestamp = _unix_seconds(match) if match else None
    if match is None or timestamp is None:
        return None
    rest = match["rest"] or ""
    level, message = "INFO", rest
    if (found := _LEVEL.match(rest)) and found["level"].upper() in _LEVELS:
        level = _LEVELS[found["level"].upper()]
        message = (found["rest"] or "").removeprefix(f"{process} ")
    return Record(timestamp, process, message, level, text=(f"{stamp(timestamp)} {rest}".rstrip(),))


def _unix_seconds(match: re.Match[str]) -> float | None:
    date, clock = match["date"].replace("/", "-"), match["clock"]
    fraction = (match["fraction"] or "0")[:6].ljust(6, "0")
    zone = match["zone"] or ""
    with suppress(ValueError, OverflowError, OSError):  # such as a month 13
        return datetime.fromisoformat(f"{date}T{clock}.{fraction}{zone}").timestamp()
    return None


def _parse_json(process: str, line: str) -> Record | None:
    """Parse a JSON object with a time; one without a message, such as nginx's, keeps its text."""
    try:
        body = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(body, dict) or not isinstance(body.get("time"), str):
        return None
    match = _STAMP.fullmatch(body["time"])
    timestamp = _unix_seconds(match) if match else None
    if timestamp is None:
        return None
    fields = {key: value for key, value in body.items() if key not in _KEYS}
    message, level = str(body.get("message", "")), str(body.get("level", "INFO"))
    traceback = str(body.get("traceback", ""))
    if "message" not in body:
        return Record(timestamp, process, message, level, traceback, fields, (line,))
    head = " ".join((stamp(timestamp), level, process, " | ".join(message.splitlines())))
    head += "".join(f" {key}={_format_value(value)}" for key, value in fields.items())
    return Record(
        timestamp, process, message, level, traceback, fields, (head, *traceback.splitlines())
    )


def _format_value(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if re.fullmatch(r"[^\s\"=]+", text) else json.dumps(text, ensure_ascii=False)
