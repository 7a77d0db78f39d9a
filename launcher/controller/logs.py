"""The controller's log on stderr, in the workers' form: text, or JSON with one object a line.

Separate from the workers' code, because neither package imports the other.
"""

from __future__ import annotations

import json
import logging
import sys
import time

PROCESS = "controller"


class _Formatter(logging.Formatter):
    """Formats times in UTC with milliseconds."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def _traceback(self, record: logging.LogRecord) -> str:
        return self.formatException(record.exc_info) if record.exc_info else ""


class TextFormatter(_Formatter):
    """A record on one line, and its traceback on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        message = " | ".join(line for line in record.getMessage().splitlines() if line.strip())
        head = f"{self.formatTime(record)} {record.levelname} {PROCESS} {message}"
        traceback = self._traceback(record)
        return f"{head}\n{traceback}" if traceback else head


class JsonFormatter(_Formatter):
    """A record on one line; its traceback is a field."""

    def format(self, record: logging.LogRecord) -> str:
        body = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "process": PROCESS,
            "message": record.getMessage(),
        }
        if traceback := self._traceback(record):
            body["traceback"] = traceback
        return json.dumps(body, ensure_ascii=False)


def set_up(log_format: str = "text") -> None:
    """Log to stderr as "text" or "json"; may be called again."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
