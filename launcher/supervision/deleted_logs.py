"""Recreate log files that were deleted while supervisord has them open.

supervisord writes every log except nginx's own, and reopens its logs on SIGUSR2.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from launcher.config.state import StateError


def reopen_missing_logs(logs: Path, names: Iterable[str], supervisor_pid: int) -> tuple[str, ...]:
    """Have supervisord reopen all logs if one was deleted. Returns the names of the deleted ones.

    ``names``: running processes ("w1", "controller", "nginx"), and "supervisord". Does nothing
    while all files exist. Raises StateError when a file cannot be created.
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
        # An error while reopening, such as a full disk, would end supervisord: fail here first.
        path = logs / f"{name}.log"
        try:
            logs.mkdir(mode=0o700, exist_ok=True)
            path.touch()
        except OSError as error:
            raise StateError(f"{path}: cannot recreate the deleted log: {error.strerror}") from None
    with suppress(ProcessLookupError):
        os.kill(supervisor_pid, signal.SIGUSR2)
    return missing


def _deleted_files(pid: int) -> set[str]:
    """Return paths of deleted files that a process has open, also if the path exists again."""
    found = set()
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                target = os.readlink(link)  # noqa: PTH115 - not a path: it has a suffix
                if target.endswith(" (deleted)"):
                    found.add(target.removesuffix(" (deleted)"))
    return found
