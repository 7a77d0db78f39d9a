"""Log files that somebody deleted while their writer has them open.

supervisord writes the logs of all processes but nginx's own; it opens them again on SIGUSR2.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from launcher.config.state import StateError


def reopen_missing_logs(logs: Path, names: Iterable[str], supervisor_pid: int) -> tuple[str, ...]:
    """Let supervisord open all logs again where one was deleted. Returns the names of those.

    ``names``: of the processes that are alive ("w1", "controller", "nginx"), and "supervisord".
    Nothing happens while all files are there. Raises StateError where a file cannot be made.
    """
    deleted = _deleted_files(supervisor_pid)
    missing = tuple(
        name
        for name in names
        if str(logs.resolve() / f"{name}.log") in deleted or not (logs / f"{name}.log").exists()
    )
    if not missing:
        return ()
    for name in missing:
        # supervisord would end by an error here, such as a full disk's; this end meets it first.
        path = logs / f"{name}.log"
        try:
            logs.mkdir(mode=0o700, exist_ok=True)
            path.touch()
        except OSError as error:
            raise StateError(f"{path}: a deleted log cannot be made: {error.strerror}") from None
    with suppress(ProcessLookupError):
        os.kill(supervisor_pid, signal.SIGUSR2)
    return missing


def _deleted_files(pid: int) -> set[str]:
    """Paths of deleted files that a process has open; also where others are there by now."""
    found = set()
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                target = os.readlink(link)  # noqa: PTH115 - a text with a suffix
                if target.endswith(" (deleted)"):
                    found.add(target.removesuffix(" (deleted)"))
    return found
