"""``python -m launcher.supervision.run_supervisord``: supervisord that outlives what goes wrong.

When a log cannot be written, supervisord prints why to its standard error. That is a file on the
same full disk, and the second failure would end it, and the whole farm's supervision with it. And
when its socket's file has been removed, it would run on unreachable: it makes another.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from supervisor import supervisord


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


class Reachable(supervisord.Supervisor):  # type: ignore[misc]
    """supervisord that looks after its socket's file about once a second."""

    def tick(self, now: float | None = None) -> None:
        super().tick(now)
        # While it ends, a socket that has gone is on purpose.
        if self.options.mood > 0 and not self.stopping:
            self._mend_socket()

    def _mend_socket(self) -> None:
        options = self.options
        for config, server in options.httpservers:
            path = Path(config["file"])
            if path.exists():
                continue
            options.logger.warn(f"the socket {path} has been removed; making it again")
            with suppress(OSError):
                path.parent.mkdir(mode=0o700, exist_ok=True)
                renewed = options.make_http_servers(self)
                self._close(server)
                options.httpservers = renewed
            return

    def _close(self, server: Any) -> None:
        with suppress(OSError, KeyError, ValueError):
            self.options.poller.unregister_readable(server.fileno())
        server.close()


if __name__ == "__main__":
    sys.stdout, sys.stderr = Lossy(sys.stdout), Lossy(sys.stderr)
    supervisord.Supervisor = Reachable
    supervisord.main()
