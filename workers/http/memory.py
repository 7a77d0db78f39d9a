"""The memory of this process."""

from __future__ import annotations

import psutil

_PROCESS = psutil.Process()


def resident_bytes() -> int:
    return int(_PROCESS.memory_info().rss)
