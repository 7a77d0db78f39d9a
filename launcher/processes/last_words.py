"""What a process wrote last, for whoever has to say why it ended."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

_OURS = re.compile(
    r"\d{4}-\d\d-\d\dT[\d:.]+Z (?P<level>[A-Z]+) w\d+ (?:cannot load: )?(?P<message>.*)"
)
"""A line of a worker's log: time, level, worker, message."""
LOG_TAIL = 4096
LONGEST_WORDS = 300


def last_line(log: Path) -> str:
    """The last line that a process wrote; empty where there is none, or where all was well.

    Of a line of our own workers only its message.
    """
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - LOG_TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if ours := _OURS.fullmatch(last):
        last = "" if ours["level"] == "INFO" else ours["message"]
    return last[:LONGEST_WORDS]


def words_since(log: Path, started: float) -> str:
    """The last line of a process that was started then (Unix seconds), not of one before it."""
    with suppress(OSError):
        if log.stat().st_mtime >= started:
            return last_line(log)
    return ""
