"""nginx writes its logs itself; it neither rotates them nor sees that one is missing: this does."""

from __future__ import annotations

from pathlib import Path

from balancer import processes
from balancer import reload as nginx_reload
from balancer.configuration import ACCESS_LOG, ERROR_LOG
from launcher.config.settings import LogsSettings
from launcher.supervision.farm import Farm


def rotate_balancer_logs(farm: Farm) -> None:
    """Keep nginx's logs of a farm as ``keep_logs`` does."""
    keep_logs(farm.state.path, farm.settings.logs)
    nginx_reload.remove_abandoned_flag(farm.state.path)


def keep_logs(prefix: Path, limits: LogsSettings) -> None:
    """Move aside the logs that have grown beyond ``max_bytes``; let nginx open the missing ones.

    A log that was deleted while nginx holds it still takes space on the disk, and cannot be read.
    """
    logs = [prefix / name for name in (ACCESS_LOG, ERROR_LOG)]
    for log in logs:
        log.parent.mkdir(mode=0o700, exist_ok=True)
        if limits.max_bytes and _size(log) > limits.max_bytes:
            shift(log, limits.backups)
    if not all(log.exists() for log in logs):
        processes.reopen_logs(prefix)


def shift(log: Path, backups: int) -> bool:
    """``log`` → ``log.1`` → ``log.2`` …, the last one dropped."""
    if backups == 0:
        log.unlink(missing_ok=True)
        return True
    for number in range(backups - 1, 0, -1):
        older = log.with_name(f"{log.name}.{number}")
        if older.exists():
            older.replace(log.with_name(f"{log.name}.{number + 1}"))
    log.replace(log.with_name(f"{log.name}.1"))
    return True


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
