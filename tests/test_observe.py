"""What the controller sees of its slots: processes, ports, and memory that has to come back."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from launcher.configuration.config import load
from launcher.configuration.state import StateDir
from launcher.control import observe
from launcher.control.observe import (
    Observer,
    device_memory,
    listener_of,
)
from launcher.control.reconcile import Memory, Record
from launcher.planning.inventory import Device, Footprint, Host, Tenant
from launcher.planning.nvml import Driver
from launcher.planning.plan import Limits, plan
from launcher.planning.sampling import tree_pss
from launcher.processes import orphans
from launcher.processes.farm import Farm
from launcher.processes.last_words import last_line, words_since
from launcher.processes.supervisor import ProcessInfo, Supervisor
from tests.waiting import free_port, until

GIB = 2**30
GPU = Device(id="GPU-1", name="A card", kind="gpu", total=24 * GIB, free=24 * GIB)
CPU = Device(id="cpu", name="CPU", kind="cpu", total=24 * GIB, free=24 * GIB)


@dataclass
class FakeSupervisor:
    """supervisord, as far as it is looked at."""

    infos: dict[str, ProcessInfo] = field(default_factory=dict)

    def processes(self) -> dict[str, ProcessInfo]:
        return self.infos

    def set(self, id_: str, state: str, pid: int = 0, exit_code: int = 0) -> None:
        started = 0 if state == "STOPPED" else 1
        self.infos[id_] = ProcessInfo(id_, state, pid, exit_code, started)


@dataclass
class FakeDriver:
    """One GPU whose memory and tenants a test sets."""

    bytes_free: int = 24 * GIB
    holders: tuple[Tenant, ...] = ()

    def __enter__(self) -> FakeDriver:
        return self

    def __exit__(self, *ignored: object) -> None: ...

    def close(self) -> None: ...

    def tenants(self, uuid: str) -> tuple[Tenant, ...]:
        assert uuid == "GPU-1"
        return self.holders

    def free(self, uuid: str) -> int:
        return self.bytes_free


def farm(tmp_path: Path, device: Device) -> Farm:
    (tmp_path / "logs").mkdir()
    planned = plan([device], Footprint.given(7 * GIB), Host(), Limits(count=2, max=2))
    return Farm(
        state=StateDir(tmp_path),
        settings=load(None, {"state_dir": str(tmp_path)}, {}),
        plan=planned.with_ports([free_port(), free_port()]),
        admin_port=1,
        socket=tmp_path / "s.sock",
    )


@dataclass
class Sight:
    """An observer with its surroundings."""

    farm: Farm
    supervisor: FakeSupervisor
    observer: Observer

    def look(self, **states: str) -> dict[str, Any]:
        records = {id_: Record(state=cast(Any, state), crashes=1) for id_, state in states.items()}
        return self.observer.look(Memory(records), ("w1", "w2"))


def sight(tmp_path: Path, device: Device) -> Sight:
    supervisor = FakeSupervisor()
    supervisor.set("w1", "STOPPED")
    supervisor.set("w2", "STOPPED")
    made = farm(tmp_path, device)
    return Sight(made, supervisor, Observer(made, cast(Supervisor, supervisor)))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setattr(Driver, "open", lambda: fake)
    return fake


def test_what_runs_is_alive_and_what_ended_tells_its_last_words(tmp_path: Path) -> None:
    seen = sight(tmp_path, CPU)
    seen.supervisor.set("w1", "RUNNING", pid=41)
    seen.supervisor.set("w2", "STOPPING", pid=42)
    alive = seen.look(w1="starting", w2="draining")
    assert (alive["w1"].alive, alive["w1"].pid, alive["w1"].stopping) == (True, 41, False)
    assert alive["w2"].stopping
    (tmp_path / "logs/w1.log").write_text("loading\nweights are missing\n\n")
    seen.supervisor.set("w1", "EXITED", exit_code=3)
    ended = seen.look(w1="starting", w2="draining")["w1"]
    assert (ended.alive, ended.exit_code, ended.last_words) == (False, 3, "weights are missing")


def test_a_gpu_is_clear_when_the_dead_process_has_left_it(
    tmp_path: Path, driver: FakeDriver
) -> None:
    seen = sight(tmp_path, GPU)
    seen.supervisor.set("w1", "RUNNING", pid=41)
    seen.look(w1="ready")
    seen.supervisor.set("w1", "EXITED", exit_code=-1)
    driver.holders = (Tenant(41, "python", 7 * GIB),)
    assert not seen.look(w1="stopped")["w1"].clear
    driver.holders, driver.bytes_free = (), 6 * GIB
    assert not seen.look(w1="stopped")["w1"].clear, "less is free than one worker needs"
    driver.bytes_free = 8 * GIB
    assert seen.look(w1="stopped")["w1"].clear


def test_memory_that_somebody_else_took_is_not_waited_for_for_ever(
    tmp_path: Path, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = sight(tmp_path, GPU)
    driver.bytes_free = 0
    assert not seen.look(w1="stopped")["w1"].clear
    monkeypatch.setattr(observe, "MEMORY_SECONDS", 0.0)
    assert seen.look(w1="stopped")["w1"].clear


def test_a_stranger_on_the_port_is_named(tmp_path: Path) -> None:
    seen = sight(tmp_path, CPU)
    port = seen.farm.plan.slots[0].port
    assert seen.look(w1="stopped")["w1"].taken_by == ""
    with socket.create_server(("127.0.0.1", port)):
        assert str(port) in seen.look(w1="stopped")["w1"].taken_by
        assert str(psutil.Process().pid) in listener_of(port)


@pytest.fixture
def left_behind(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process as a worker w1 of this farm would have started it."""
    marks = {
        "SUPERVISOR_SERVER_URL": f"unix://{tmp_path / 's.sock'}",
        "SUPERVISOR_PROCESS_NAME": "w1",
    }
    process = subprocess.Popen(["sleep", "100"], env={"PATH": "/usr/bin:/bin", **marks})
    # While it is being executed it has its name already, and no environment yet.
    until(lambda: marks.items() <= psutil.Process(process.pid).environ().items(), "it has started")
    yield process
    process.kill()
    process.wait()


def test_what_a_dead_worker_left_behind_is_ended_before_the_next_start(
    tmp_path: Path, left_behind: subprocess.Popen[bytes]
) -> None:
    seen = sight(tmp_path, CPU)
    seen.look(w1="ready", w2="stopped")
    assert left_behind.poll() is None, "another slot's business"
    assert seen.look(w1="stopped")["w1"].clear
    assert left_behind.wait(10) == -9


def test_a_drained_server_may_finish_behind_its_shell(
    tmp_path: Path, left_behind: subprocess.Popen[bytes]
) -> None:
    seen = sight(tmp_path, CPU)
    drained = Memory({"w1": Record(state="stopped", crashes=0)})
    assert not seen.observer.look(drained, ("w1", "w2"))["w1"].clear
    assert left_behind.poll() is None


def test_orphans_are_known_by_their_supervisor_and_strangers_are_not(
    tmp_path: Path, left_behind: subprocess.Popen[bytes]
) -> None:
    with subprocess.Popen(["sleep", "100"]) as stranger:
        mine = tmp_path / "s.sock"
        assert [p.pid for p in orphans.children_of(mine)] == [left_behind.pid]
        assert orphans.children_of(mine, "w2") == []
        assert orphans.children_of(tmp_path / "other.sock") == []
        begun = time.monotonic()
        assert orphans.clean(tmp_path, mine, graceful_seconds=20) == 1
        assert time.monotonic() - begun < 15
        assert not psutil.pid_exists(left_behind.pid)
        assert stranger.poll() is None
        stranger.kill()


def test_a_pid_that_was_used_again_is_not_signalled(left_behind: subprocess.Popen[bytes]) -> None:
    impostor = psutil.Process(left_behind.pid)
    impostor._create_time = 1.0  # type: ignore[attr-defined]
    impostor._ident = (left_behind.pid, 1.0)  # type: ignore[attr-defined]
    orphans.end([impostor], graceful_seconds=0.2)
    assert left_behind.poll() is None


def test_memory_is_the_whole_trees_or_the_gpus(tmp_path: Path, driver: FakeDriver) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        children = until(lambda: psutil.Process(process.pid).children(), "it has a child")
        assert tree_pss(process.pid) > psutil.Process(process.pid).memory_full_info().pss
        on_cpu = device_memory(farm(tmp_path, CPU), {"w1": process.pid})
        assert on_cpu["w1"] > 2**20
        driver.holders = (Tenant(children[0].pid, "", 5 * GIB), Tenant(1, "", 3 * GIB))
        (tmp_path / "gpu").mkdir()
        assert device_memory(farm(tmp_path / "gpu", GPU), {"w1": process.pid}) == {"w1": 5 * GIB}
        process.communicate(b"\n")
    assert tree_pss(process.pid) == 0


def test_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_line(log) == ""
    log.write_text("x" * 10000 + "\n" + "the end " + "y" * 1000 + "\n \n")
    assert last_line(log).startswith("the end")
    assert len(last_line(log)) == 300
    log.write_text("2026-01-02T03:04:05.678Z ERROR w1 cannot load: there are no weights\n")
    assert last_line(log) == "there are no weights"
    log.write_text("2026-01-02T03:04:05.678Z INFO w1 ready url=http://127.0.0.1:1\n")
    assert last_line(log) == "", "it says nothing about an end"
    told = {"time": "2026-01-02T03:04:05.678Z", "process": "w1", "level": "ERROR"}
    log.write_text(json.dumps(told | {"message": "cannot load: there are no weights"}) + "\n")
    assert last_line(log) == "there are no weights"
    log.write_text(json.dumps(told | {"level": "INFO", "message": "ready"}) + "\n")
    assert last_line(log) == ""
    log.write_text('{"error": "no weights"}\n')
    assert last_line(log) == '{"error": "no weights"}'
    foreign = "2026-01-02T03:04:05.678Z INFO server exiting: CUDA error 700"
    log.write_text(f"{foreign}\n")
    assert last_line(log) == foreign, "somebody else's lines stay as they are"


def test_last_words_are_those_of_the_process_that_ended(tmp_path: Path) -> None:
    """The log outlives many processes, and a crash without a word must not quote another's."""
    log = tmp_path / "w1.log"
    log.write_text("an older process could not load\n")
    os.utime(log, (1000, 1000))
    assert words_since(log, 1001) == ""
    assert words_since(log, 1000) == "an older process could not load"
    assert words_since(tmp_path / "w2.log", 0) == ""
