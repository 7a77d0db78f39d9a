"""The exit codes of every command."""

from __future__ import annotations

DONE, FAILED, BAD_CONFIGURATION, DOES_NOT_FIT, NOT_RUNNING = 0, 1, 2, 3, 4
INTERRUPTED = 130
