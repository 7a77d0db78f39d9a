"""Exit codes: those of every command, and those by which a worker says how it ended.

Standard library only: what a supervisor or a worker starts with imports this module.
"""

from __future__ import annotations

DONE, FAILED, BAD_CONFIGURATION, DOES_NOT_FIT, NOT_RUNNING = 0, 1, 2, 3, 4
INTERRUPTED = 130

LOAD_FAILED = 1
"""A worker could not load this time; another attempt may succeed."""
CANNOT_LOAD = 3
"""A worker cannot load, and another attempt would not help."""
