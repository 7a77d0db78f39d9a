"""``python -m launcher.supervision.run_supervisord``: supervisord that survives common failures.

When supervisord cannot write a log, it reports that to stderr: a file on the same full disk, whose
failure would end it. And if its socket's file is deleted, it would keep running unreachable; this
one creates it again.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from supervisor import supervisord


class LossyStream:
    """A text stream that drops what it cannot write."""

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
        """Do nothing: ``write`` flushes."""

    def fileno(self) -> int:
        return self._stream.fileno()


class SocketKeepingSupervisor(supervisord.Supervisor):  # type: ignore[misc]
    """supervisord that checks about once a second that its socket's file exists."""

    def tick(self, now: float | None = None) -> None:
        super().tick(now)
        # During shutdown supervisord itself removes the socket.
        if self.options.mood > 0 and not self.stopping:
            self._recreate_socket()

    def _recreate_socket(self) -> None:
        options = self.options
        for config, server in options.httpservers:
            path = Path(config["file"])
            if path.exists():
                continue
            options.logger.warn(f"the socket {path} was deleted; creating it again")
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
    sys.stdout, sys.stderr = LossyStream(sys.stdout), LossyStream(sys.stderr)
    supervisord.Supervisor = SocketKeepingSupervisor
    supervisord.main()
