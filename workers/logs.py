"""Logs of a worker on stderr: ``time level worker message key=value …``, or JSON, an object a line.

A traceback follows its record on lines of its own, or is one field of it.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import Any

log = logging.getLogger("gpufarm.worker")

_PLAIN = re.compile(r"[^\s\"=]+")
"""Values that the text format writes without quotes."""


class _Formatter(logging.Formatter):
    """Timestamps in UTC, to the millisecond. A record may carry ``fields`` (a dict) and
    ``traceback`` (a str)."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def _traceback(self, record: logging.LogRecord) -> str:
        parts = [getattr(record, "traceback", "")]
        if record.exc_info:
            parts.append(self.formatException(record.exc_info))
        if record.stack_info:
            parts.append(self.formatStack(record.stack_info))
        return "\n".join(line for part in parts for line in part.splitlines() if line.strip())


class TextFormatter(_Formatter):
    """Puts the message on one line, whatever it contains."""

    def format(self, record: logging.LogRecord) -> str:
        lines = [line for line in record.getMessage().splitlines() if line.strip()]
        head = f"{self.formatTime(record)} {record.levelname} {self._process} {' | '.join(lines)}"
        for key, value in getattr(record, "fields", {}).items():
            text = str(value)
            head += f" {key}={text if _PLAIN.fullmatch(text) else json.dumps(text)}"
        traceback = self._traceback(record)
        return f"{head}\n{traceback}" if traceback else head


class JsonFormatter(_Formatter):
    """``time``, ``level``, ``process``, ``message``, the fields, and ``traceback`` if any."""

    def format(self, record: logging.LogRecord) -> str:
        body: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "process": self._process,
            "message": record.getMessage(),
        }
        body = {**getattr(record, "fields", {}), **body}
        if traceback := self._traceback(record):
            body["traceback"] = traceback
        return json.dumps(body, ensure_ascii=False, default=str)


class _ExpectedErrors(logging.Filter):
    """Drops uvicorn's complaint about responses that were cut off on purpose: the access log has
    the reason."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "without completing response" not in record.getMessage()


_expected_errors = _ExpectedErrors()


def set_up(worker_id: str, log_format: str = "text") -> None:
    """Log to stderr as "text" or "json"; may be called again."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = JsonFormatter if log_format == "json" else TextFormatter
    handler.setFormatter(formatter(worker_id))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    log.setLevel(logging.INFO)
    uvicorn = logging.getLogger("uvicorn.error")
    uvicorn.setLevel(logging.WARNING)
    uvicorn.addFilter(_expected_errors)
    logging.captureWarnings(True)
