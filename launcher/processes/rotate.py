"""nginx writes its logs itself and never rotates them: this does."""

from __future__ import annotations

from pathlib import Path

from balancer import processes
from balancer.configuration import ACCESS_LOG, ERROR_LOG
from launcher.processes.farm import Farm


def rotate_balancer_logs(farm: Farm) -> None:
    """Move aside what has grown beyond ``logs.max_bytes`` and let nginx open new files."""
    limits = farm.settings.logs
    moved = [
        shift(farm.state.path / name, limits.backups)
        for name in (ACCESS_LOG, ERROR_LOG)
        if limits.max_bytes and _size(farm.state.path / name) > limits.max_bytes
    ]
    if any(moved):
        processes.reopen_logs(farm.state.path)


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
