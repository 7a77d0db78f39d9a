"""The plan that `up` makes: with what the farm's own workers hold, without what others reserved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.up import make_plan
from launcher.config.settings import Settings, load
from launcher.config.sizes import GIB, MIB
from launcher.config.state import StateDir
from launcher.planning import host, reservations
from launcher.planning.footprint_store import FootprintStore, key_of
from launcher.planning.held import Held, about_to_use, held_by
from launcher.planning.inventory import Device, Footprint, Host
from launcher.planning.nvml import Driver
from launcher.planning.plan import DoesNotFit, Limits, Plan, plan
from tests.launcher.planning.fake_nvml import FakeNvml, Gpu

FOOTPRINT = Footprint(2 * GIB, 2 * GIB, 4 * GIB, "measured", "2026-01-01", "Card", 9, 3)


class Machine:
    """One 24 GiB GPU and 40 GiB of RAM, and the settings of a farm on it."""

    def __init__(self, folder: Path) -> None:
        self.gpu = Gpu("GPU-a", 24 * GIB, 24 * GIB)
        self.host = Host(64, 40 * GIB, 40 * GIB, "affinity", "MemAvailable")
        self.state = StateDir(folder / "state").create()
        self.folder = folder
        self.reports: list[str] = []

    def settings(self, **more: Any) -> Settings:
        (self.folder / "gpufarm.toml").write_text("")
        given = {"model.target": "hello:Hello", "state_dir": str(self.state.path)} | more
        return load(self.folder / "gpufarm.toml", given, {"HOME": str(self.folder)})

    def know(self, footprint: Footprint, settings: Settings) -> None:
        driver = Driver.open()
        assert driver is not None
        with driver:
            for group in driver.devices():
                FootprintStore(self.state).put(key_of(settings, group[0]), footprint)

    def plan(self, held: Held | None = None, given: Mapping[str, Any] | None = None) -> Plan:
        settings = self.settings(**(given or {}))
        self.know(FOOTPRINT, settings)
        return make_plan(settings, self.state, self.reports.append, held)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    monkeypatch.setattr(reservations, "PARENTS", (shared,))
    built = Machine(tmp_path)
    monkeypatch.setattr(Driver, "open", lambda nvml=None: Driver(FakeNvml(built.gpu)))
    monkeypatch.setattr(host, "read_host", lambda: built.host)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return built


def test_host_ram_of_running_gpu_workers_counts_as_free(machine: Machine) -> None:
    first = machine.plan()
    assert first.count == 9  # 40 GiB less 2 GiB headroom, 4 GiB each
    machine.host = replace(machine.host, ram_free=12 * GIB)
    machine.gpu.free -= 14 * GIB
    assert machine.plan(Held({"GPU-a": 14 * GIB}, 28 * GIB)).count == 9
    with pytest.raises(DoesNotFit, match="host RAM allows 2"):
        machine.plan(Held({"GPU-a": 14 * GIB}), {"workers.count": 7})


def test_held_memory_never_exceeds_what_the_host_has(machine: Machine) -> None:
    planned = machine.plan(Held({"GPU-a": 90 * GIB}, 90 * GIB))
    assert planned.host.ram_free == 40 * GIB
    assert planned.devices[0].device.free == 24 * GIB
    assert machine.plan(Held({}, 28 * GIB), {"budget.ram": "20GiB"}).host.ram_free == 20 * GIB


def test_held_is_read_from_the_workers(machine: Machine) -> None:
    gone = 2**22 + 11
    workers: list[dict[str, Any]] = [
        {"id": "w1", "pid": os.getpid(), "device": "GPU-a", "memory_bytes": 3 * GIB},
        {"id": "w2", "pid": gone, "device": "GPU-a", "memory_bytes": None},
        {"id": "w3", "pid": None, "device": "GPU-a", "memory_bytes": None},
        {"id": "w4", "pid": os.getpid(), "device": "cpu", "memory_bytes": GIB},
    ]
    held = held_by(workers, FOOTPRINT)
    assert held.devices == {"GPU-a": 5 * GIB, "cpu": GIB}
    assert held.host_ram > 4 * GIB + MIB, "of a process that is gone what was measured"
    assert held.ram == held.host_ram + GIB


def test_about_to_use_is_the_plan_less_what_is_held() -> None:
    card = Device("GPU-a", "Card", "gpu", 24 * GIB, 24 * GIB)
    other = Device("GPU-b", "Card", "gpu", 24 * GIB, 24 * GIB)
    footprint = Footprint(3 * GIB, 2 * GIB, GIB)
    planned = plan([card, other], footprint, Host(), Limits(count=3))
    assert [row.workers for row in planned.devices] == [2, 1]
    assert about_to_use(planned) == {"GPU-a": 5 * GIB, "GPU-b": 3 * GIB, "cpu": 3 * GIB}
    held = Held({"GPU-a": 4 * GIB, "GPU-b": 9 * GIB}, 2 * GIB)
    assert about_to_use(planned, held) == {"GPU-a": GIB, "cpu": GIB}
    cpu = Device("cpu", "CPU", "cpu", 24 * GIB, 24 * GIB)
    alone = plan([cpu], footprint, Host(), Limits(count=2))
    assert about_to_use(alone) == {"cpu": 5 * GIB}
    assert about_to_use(alone, Held({"cpu": 4 * GIB})) == {"cpu": GIB}


def test_memory_reserved_by_another_farm_is_not_planned_with(machine: Machine) -> None:
    another = machine.folder / "another"
    reservations.reserve(another, {"GPU-a": 20 * GIB, "cpu": 8 * GIB, "GPU-z": GIB})
    planned = machine.plan()
    assert planned.devices[0].device.free == 4 * GIB
    assert planned.host.ram_free == 32 * GIB
    assert planned.count == 1
    assert "20 GiB of Card are about to be used by another farm" in machine.reports
    assert "8 GiB of RAM are about to be used by another farm" in machine.reports
    assert len(machine.reports) == 2
    assert reservations.others(another) == {"GPU-a": 2 * GIB, "cpu": 4 * GIB}
    with pytest.raises(DoesNotFit, match=r"memory allows 1.*20 GiB of Card are about to be used"):
        machine.plan(given={"workers.count": 2})
    assert reservations.others(another) == {"GPU-a": 2 * GIB, "cpu": 4 * GIB}, "as it was"


def test_a_configured_ram_budget_is_shared_with_another_farm(machine: Machine) -> None:
    reservations.reserve(machine.folder / "another", {"cpu": 8 * GIB})
    assert machine.plan(given={"budget.ram": "100GiB"}).host.ram_free == 92 * GIB
    assert machine.plan(given={"budget.ram": "16GiB"}).host.ram_free == 16 * GIB
