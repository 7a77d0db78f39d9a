"""``python -m launcher.processes.supervising``: supervisord, which must outlive a full disk.

When a log cannot be written, supervisord prints why to its standard error. That is a file on the
same full disk, and the second failure would end it, and the whole farm's supervision with it.
"""

from __future__ import annotations

import sys
from typing import TextIO

from supervisor.supervisord import main


class Lossy:
    """A stream that drops what it cannot write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            return 0
        return len(text)

    def flush(self) -> None:
        """Nothing is ever held back."""

    def fileno(self) -> int:
        return self._stream.fileno()


if __name__ == "__main__":
    sys.stdout, sys.stderr = Lossy(sys.stdout), Lossy(sys.stderr)
    main()
