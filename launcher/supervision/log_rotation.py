"""Rotate nginx's logs, and have it reopen missing ones: it does neither itself."""

from __future__ import annotations

from pathlib import Path

from balancer import processes
from balancer import reload as nginx_reload
from balancer.configuration import ACCESS_LOG, ERROR_LOG
from launcher.config.settings import LogsSettings
from launcher.supervision.farm import Farm


def rotate_balancer_logs(farm: Farm) -> None:
    """Rotate the logs of a farm's nginx, and remove a flag that a killed reload left."""
    rotate_logs(farm.state.path, farm.settings.logs)
    nginx_reload.remove_abandoned_flag(farm.state.path)


def rotate_logs(prefix: Path, limits: LogsSettings) -> None:
    """Rotate logs larger than ``max_bytes``, and have nginx reopen missing ones.

    A deleted log that nginx has open still uses disk space and cannot be read.
    """
    logs = [prefix / name for name in (ACCESS_LOG, ERROR_LOG)]
    for log in logs:
        log.parent.mkdir(mode=0o700, exist_ok=True)
        if limits.max_bytes and _size(log) > limits.max_bytes:
            shift(log, limits.backups)
    if not all(log.exists() for log in logs):
        processes.reopen_logs(prefix)


def shift(log: Path, backups: int) -> bool:
    """``log`` → ``log.1`` → ``log.2`` …, dropping the last one."""
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
