"""Record which request every worker of the farm is running, in a file that outlives the workers.

The balancer retries a request when its worker dies. A request that crashes every worker would take
down one after another; with this file the next worker knows how many it has crashed.

Each worker writes only its own row of `ROW` bytes: the key of the request that it runs, then those
that crashed it. A key is the balancer's id of one request, 32 characters.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

FILE = "running-requests"
MAX_CRASHES = 2
"""A request that crashed this many workers is not run again."""

_KEY = re.compile(r"[0-9a-f]{32}")
_BYTES = 32
_KEYS = 4
ROW = _BYTES * _KEYS
_NONE = bytes(_BYTES)


class CrashGuard:
    """One worker's view. Without a file, or where it is not writable, it rejects nothing."""

    def __init__(self, folder: Path | None, worker_id: str) -> None:
        """Open the file, and record a crash for the request of this worker's last process."""
        self._fd: int | None = None
        number = re.fullmatch(r"w([1-9][0-9]{0,3})", worker_id)
        if folder is None or number is None:
            return
        self._at = ROW * (int(number[1]) - 1)
        with suppress(OSError):
            fd = os.open(folder / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, self._at, ROW)  # so that a full disk fails here
                row = os.pread(fd, ROW, self._at)
                if row[:_BYTES] != _NONE:
                    os.pwrite(fd, _NONE + row[:-_BYTES], self._at)
            except OSError:
                os.close(fd)
                raise
            self._fd = fd

    @staticmethod
    def key(header: str) -> str:
        """Return the balancer's id of a request; empty where the header is not one."""
        return header if _KEY.fullmatch(header) else ""

    def ended(self, key: str) -> int:
        """Count the worker processes that ended while they ran this request. Takes microseconds."""
        if self._fd is None or not key:
            return 0
        with suppress(OSError):
            return os.pread(self._fd, os.fstat(self._fd).st_size, 0).count(key.encode())
        return 0

    def begin(self, key: str) -> None:
        """Record that this worker runs the request; an empty key stands for none."""
        if self._fd is not None:
            with suppress(OSError):
                os.pwrite(self._fd, key.encode() or _NONE, self._at)

    def end(self) -> None:
        """Record that the request is over, without a crash."""
        self.begin("")
