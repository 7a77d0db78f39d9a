"""Read the cores and RAM that this process may use: affinity, cgroup v1 and v2, MemAvailable.

All files are read below ``root``, so that a test can lay out any machine in a folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from launcher.planning.inventory import Host

UNLIMITED = 1 << 60
"""cgroup v1 writes "no limit" as a number near 2⁶³."""


@dataclass(frozen=True)
class CgroupFolder:
    """One level of a control group: the folder with its limits."""

    path: Path
    version: int


def read_host(root: Path = Path("/"), affinity: int | None = None) -> Host:
    """Return what this process may use. ``affinity``: its number of cores; None asks the kernel."""
    cores, cores_from = float(affinity or len(os.sched_getaffinity(0))), "affinity"
    for folder in cgroup_folders(root, "cpu"):
        quota = cpu_quota(folder)
        if quota is not None and quota < cores:
            cores, cores_from = quota, f"cgroup v{folder.version} quota"
    total, free = meminfo(root)
    ram_from = "MemAvailable"
    for folder in cgroup_folders(root, "memory"):
        limit = memory_limit(folder)
        if limit is None:
            continue
        total = min(total, limit)
        room = max(0, limit - working_set(folder))
        if room < free:
            free, ram_from = room, f"cgroup v{folder.version} limit"
    return Host(cores, total, free, cores_from, ram_from)


def overridden(host: Host, cores: int = 0, ram: int | None = None) -> Host:
    """Apply budget.cores and budget.ram. Less RAM than there is limits; more is trusted."""
    if cores:
        host = replace(host, cores=float(cores), cores_from="given")
    if ram is not None:
        known = host.ram_total is not None and host.ram_free is not None
        free = min(ram, host.ram_free or 0) if known and ram <= (host.ram_total or 0) else ram
        host = replace(host, ram_total=ram, ram_free=free, ram_from="given")
    return host


def meminfo(root: Path) -> tuple[int, int]:
    """Return (MemTotal, MemAvailable) in bytes."""
    values: dict[str, int] = {}
    for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if rest.split():
            values[name] = int(rest.split()[0]) * 1024
    return values["MemTotal"], values.get("MemAvailable", values.get("MemFree", 0))


def cgroup_folders(root: Path, controller: str) -> Iterator[CgroupFolder]:
    """Yield this process's control group and its ancestors for one controller, innermost first.

    On a hybrid machine both versions are walked.
    """
    groups = _own_groups(root)
    for mount_point, mount_root, controllers in _mounts(root):
        version = 2 if controllers is None else 1
        if controllers is not None and controller not in controllers:
            continue
        key = "" if controllers is None else controller
        if key not in groups:
            continue
        top = root / mount_point.relative_to("/")
        folder = top / _inside(groups[key], mount_root)
        while True:
            if folder.is_dir():
                yield CgroupFolder(folder, version)
            if folder == top or top not in folder.parents:
                break
            folder = folder.parent


def _own_groups(root: Path) -> dict[str, PurePosixPath]:
    """Return controller → path in its hierarchy; "" is version 2."""
    groups: dict[str, PurePosixPath] = {}
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, names, path = line.split(":", 2)
            for name in names.split(","):
                groups[name] = PurePosixPath(path)
    return groups


def _mounts(root: Path) -> Iterator[tuple[PurePosixPath, PurePosixPath, set[str] | None]]:
    """Yield (mount point, mounted part of the hierarchy, v1 controllers or None for v2)."""
    try:
        lines = (root / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        before, separator, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if not separator or len(fields) < 5 or not kind or kind[0] not in ("cgroup", "cgroup2"):
            continue
        controllers = None if kind[0] == "cgroup2" else set(kind[-1].split(","))
        yield PurePosixPath(fields[4]), PurePosixPath(fields[3]), controllers


def _inside(group: PurePosixPath, mount_root: PurePosixPath) -> PurePosixPath:
    """Return the group's path below the mount point.

    In a container only its own part is mounted and the path may lie outside (``/..``): then the
    mount point itself is the group.
    """
    if ".." in group.parts:
        return PurePosixPath()
    if group.is_relative_to(mount_root):
        return group.relative_to(mount_root)
    return PurePosixPath()


def cpu_quota(folder: CgroupFolder) -> float | None:
    """Return the cores that the quota of this level allows; None without a quota."""
    if folder.version == 2:
        fields = _text(folder.path / "cpu.max").split()
        quota, period = fields if len(fields) == 2 else ("max", "")
    else:
        quota = _text(folder.path / "cpu.cfs_quota_us")
        period = _text(folder.path / "cpu.cfs_period_us")
    if not quota.isdecimal() or not period.isdecimal() or int(period) == 0:
        return None
    return int(quota) / int(period)


def memory_limit(folder: CgroupFolder) -> int | None:
    """Return the bytes that this level allows; None without a limit."""
    names = ("memory.max", "memory.high") if folder.version == 2 else ("memory.limit_in_bytes",)
    limits = [int(text) for name in names if (text := _text(folder.path / name)).isdecimal()]
    limits = [limit for limit in limits if limit < UNLIMITED]
    return min(limits, default=None)


def working_set(folder: CgroupFolder) -> int:
    """Return the bytes in use at this level, without page cache that the kernel can reclaim."""
    name = "memory.current" if folder.version == 2 else "memory.usage_in_bytes"
    used = _text(folder.path / name)
    cache = "inactive_file" if folder.version == 2 else "total_inactive_file"
    inactive = 0
    for line in _text(folder.path / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key == cache and value.isdecimal():
            inactive = int(value)
    return max(0, (int(used) if used.isdecimal() else 0) - inactive)


def killed_for_memory(root: Path = Path("/")) -> int:
    """Return how many processes of this control group the OOM killer has ended.

    Includes the groups below it; 0 where the group does not count them.
    """
    for folder in cgroup_folders(root, "memory"):
        name = "memory.events" if folder.version == 2 else "memory.oom_control"
        for line in _text(folder.path / name).splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill" and value.isdecimal():
                return int(value)
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
