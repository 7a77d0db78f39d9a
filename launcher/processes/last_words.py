"""What a process wrote last, for whoever has to say why it ended."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

LOG_TAIL = 4096
LONGEST_WORDS = 300


def last_line(log: Path) -> str:
    """The last line that a process wrote; empty where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - LOG_TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip()[:LONGEST_WORDS] for line in reversed(lines) if line.strip()), "")


def words_since(log: Path, started: float) -> str:
    """The last line of a process that was started then (Unix seconds), not of one before it."""
    with suppress(OSError):
        if log.stat().st_mtime >= started:
            return last_line(log)
    return ""
