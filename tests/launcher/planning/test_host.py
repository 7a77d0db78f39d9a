"""Cores and RAM within limits, over machines laid out in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config.sizes import GIB, MIB
from launcher.planning.host import killed_for_memory, overridden, read_host
from launcher.planning.inventory import Host

V2 = "31 23 0:27 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = "{id} 23 0:30 {root} /sys/fs/cgroup/{name} rw - cgroup cgroup rw,{name}\n"


def machine(
    root: Path,
    files: dict[str, str],
    groups: str = "0::/\n",
    mounts: str = V2.format(root="/"),
    total: int = 32 * GIB,
    available: int = 20 * GIB,
) -> Path:
    text = f"MemTotal: {total // 1024} kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB\n"
    base = {"proc/meminfo": text, "proc/self/cgroup": groups, "proc/self/mountinfo": mounts}
    for name, content in (base | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return root


def test_without_limits_it_is_affinity_and_available_memory(tmp_path: Path) -> None:
    host = read_host(machine(tmp_path, {}), affinity=8)
    assert host == Host(8, 32 * GIB, 20 * GIB, "affinity", "MemAvailable")


def test_version_2_limits(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/a/b/memory.max": f"{8 * GIB}\n",
        "sys/fs/cgroup/a/b/memory.current": f"{3 * GIB}\n",
        "sys/fs/cgroup/a/b/memory.stat": f"anon 5\ninactive_file {1 * GIB}\n",
    }
    host = read_host(machine(tmp_path, files, "0::/a/b\n"), affinity=8)
    assert (host.cores, host.cores_from) == (1.5, "cgroup v2 quota")
    assert (host.ram_total, host.ram_free) == (8 * GIB, 6 * GIB)
    assert host.ram_from == "cgroup v2 limit"


def test_a_limit_further_up_counts_too(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
        "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/memory.high": f"{4 * GIB}\n",
        "sys/fs/cgroup/a/memory.current": f"{1 * GIB}\n",
    }
    host = read_host(machine(tmp_path, files, "0::/a/b\n"), affinity=8)
    assert (host.cores, host.ram_total, host.ram_free) == (2.0, 4 * GIB, 3 * GIB)


def test_version_1_limits_and_its_number_for_none(tmp_path: Path) -> None:
    mounts = V1.format(id=40, root="/", name="cpu,cpuacct") + V1.format(
        id=41, root="/", name="memory"
    )
    files = {
        "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes": f"{2 * GIB}\n",
        "sys/fs/cgroup/memory/docker/x/memory.usage_in_bytes": f"{512 * MIB}\n",
        "sys/fs/cgroup/memory/docker/x/memory.stat": f"total_inactive_file {256 * MIB}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    }
    groups = "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n1:name=systemd:/\n"
    host = read_host(machine(tmp_path, files, groups, mounts), affinity=4)
    assert (host.cores, host.cores_from) == (0.5, "cgroup v1 quota")
    assert (host.ram_total, host.ram_free) == (2 * GIB, 2 * GIB - 256 * MIB)


@pytest.mark.parametrize("group", ["/docker/x", "/../../y", "/elsewhere"])
def test_in_a_container_its_own_group_is_the_mount_point(tmp_path: Path, group: str) -> None:
    files = {"sys/fs/cgroup/memory.max": f"{GIB}\n", "sys/fs/cgroup/memory.current": "0\n"}
    mounts = V2.format(root="/docker/x")
    host = read_host(machine(tmp_path, files, f"0::{group}\n", mounts), affinity=1)
    assert host.ram_total == GIB


def test_a_hybrid_machine_reads_both(tmp_path: Path) -> None:
    mounts = V1.format(id=40, root="/", name="memory") + V2.format(root="/").replace(
        "/sys/fs/cgroup ", "/sys/fs/cgroup/unified "
    )
    files = {
        "sys/fs/cgroup/memory/x/memory.limit_in_bytes": f"{3 * GIB}\n",
        "sys/fs/cgroup/unified/cgroup.procs": "1\n",
    }
    host = read_host(machine(tmp_path, files, "4:memory:/x\n0::/\n", mounts), affinity=1)
    assert host.ram_total == 3 * GIB


def test_a_limit_above_the_machine_says_nothing(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory.max": f"{64 * GIB}\n"}
    host = read_host(machine(tmp_path, files), affinity=1)
    assert (host.ram_total, host.ram_free) == (32 * GIB, 20 * GIB)


@pytest.mark.parametrize("text", ["", "garbage", "max", "100000", "1 0", "x 100000"])
def test_unreadable_limits_are_none(tmp_path: Path, text: str) -> None:
    files = {"sys/fs/cgroup/cpu.max": text, "sys/fs/cgroup/memory.max": f"{text}x"}
    assert read_host(machine(tmp_path, files), affinity=3).cores == 3


def test_a_machine_without_cgroups(tmp_path: Path) -> None:
    root = machine(tmp_path, {})
    (root / "proc/self/cgroup").unlink()
    (root / "proc/self/mountinfo").unlink()
    assert read_host(root, affinity=2).cores == 2


def test_this_machine_answers() -> None:
    host = read_host()
    assert host.cores
    assert host.ram_total
    assert host.ram_free is not None
    assert 0 < host.ram_free <= host.ram_total


def test_what_somebody_says_goes() -> None:
    host = Host(4, 32 * GIB, 20 * GIB, "affinity", "MemAvailable")
    assert overridden(host) == host
    said = overridden(host, cores=2, ram=8 * GIB)
    assert (said.cores, said.ram_total, said.ram_free) == (2, 8 * GIB, 8 * GIB)
    assert overridden(host, ram=30 * GIB).ram_free == 20 * GIB
    assert overridden(host, ram=64 * GIB).ram_free == 64 * GIB


def test_processes_that_the_kernel_has_ended_for_memory(tmp_path: Path) -> None:
    events = "low 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n"
    root = machine(tmp_path / "v2", {"sys/fs/cgroup/a/memory.events": events}, "0::/a\n")
    assert killed_for_memory(root) == 2
    control = "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n"
    files = {"sys/fs/cgroup/memory/x/memory.oom_control": control}
    mounts = V1.format(id=41, root="/", name="memory")
    assert killed_for_memory(machine(tmp_path / "v1", files, "4:memory:/x\n", mounts)) == 4
    assert killed_for_memory(machine(tmp_path / "none", {})) == 0
