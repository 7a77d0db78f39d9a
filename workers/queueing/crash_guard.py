"""Which request every worker of the farm is running: a small file that outlives their processes.

The balancer sends a request again when its worker dies. A request that kills whoever runs it would
so end one worker after another; here the next one sees what became of those before it.

Each worker writes its own row alone, of `ROW` bytes: the key of the request that it runs, then of
those during which its process ended. A key is 32 characters, the balancer's own for one request.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

FILE = "running-requests"
MAX_CRASHES = 2
"""A request that ended so many workers is given to no other."""

_KEY = re.compile(r"[0-9a-f]{32}")
_BYTES = 32
_KEYS = 4
ROW = _BYTES * _KEYS
_NONE = bytes(_BYTES)


class CrashGuard:
    """One worker's view. Without a file, or where it cannot be written, nothing is ever refused."""

    def __init__(self, folder: Path | None, worker_id: str) -> None:
        """Opens the file and moves aside what an earlier process of this worker left unfinished."""
        self._fd: int | None = None
        number = re.fullmatch(r"w([1-9][0-9]{0,3})", worker_id)
        if folder is None or number is None:
            return
        self._at = ROW * (int(number[1]) - 1)
        with suppress(OSError):
            fd = os.open(folder / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, self._at, ROW)  # so that a full disk is met here and now
                row = os.pread(fd, ROW, self._at)
                if row[:_BYTES] != _NONE:
                    os.pwrite(fd, _NONE + row[:-_BYTES], self._at)
            except OSError:
                os.close(fd)
                raise
            self._fd = fd

    @staticmethod
    def key(header: str) -> str:
        """The key that the balancer gave a request; empty where it is none."""
        return header if _KEY.fullmatch(header) else ""

    def ended(self, key: str) -> int:
        """How many workers' processes ended while they ran this request. Some microseconds."""
        if self._fd is None or not key:
            return 0
        with suppress(OSError):
            return os.pread(self._fd, os.fstat(self._fd).st_size, 0).count(key.encode())
        return 0

    def begin(self, key: str) -> None:
        """This worker runs the request from now on; an empty key stands for none."""
        if self._fd is not None:
            with suppress(OSError):
                os.pwrite(self._fd, key.encode() or _NONE, self._at)

    def end(self) -> None:
        """The request is over, and this process still there."""
        self.begin("")
