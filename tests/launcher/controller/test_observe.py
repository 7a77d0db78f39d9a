"""What the controller sees of its slots: processes, ports, and memory that has to come back."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from launcher.config.settings import load
from launcher.controller import observe
from launcher.controller.model import Memory, Observation, Record
from launcher.controller.observe import Observer, Start, device_memory, listener_of, refusal_for
from launcher.planning.inventory import Device, Footprint, Host, Tenant
from launcher.planning.nvml import Driver
from launcher.planning.plan import Limits, plan
from launcher.planning.sampling import tree_pss
from launcher.supervision import leftovers, ports
from launcher.supervision.exit_reason import exit_reason, exit_reason_since
from launcher.supervision.farm import Farm
from launcher.supervision.ports import HeldPorts
from launcher.supervision.supervisord import MARK, ProcessInfo, Supervisor
from launcher.supervision.supervisord import environment as supervisor_environment
from tests.launcher.supervision.farm_records import farm_of
from tests.repository import REPOSITORY
from tests.waiting import free_port, until

GIB = 2**30
GPU = Device(id="GPU-1", name="A card", kind="gpu", total=24 * GIB, free=24 * GIB)
CPU = Device(id="cpu", name="CPU", kind="cpu", total=24 * GIB, free=24 * GIB)


@dataclass
class FakeSupervisor:
    """supervisord, as far as it is looked at."""

    infos: dict[str, ProcessInfo] = field(default_factory=dict)
    held: HeldPorts = field(default_factory=HeldPorts)

    def hold(self, wanted: Sequence[int]) -> frozenset[int]:
        return frozenset(port for port in wanted if not self.held.hold(port))

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


def farm(tmp_path: Path, device: Device, **changes: Any) -> Farm:
    (tmp_path / "logs").mkdir()
    planned = plan([device], Footprint.given(7 * GIB), Host(), Limits(count=2, max=2))
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    settings = load(None, {"state_dir": str(tmp_path), **dotted}, {})
    return farm_of(settings, planned, [free_port(), free_port()])


@dataclass
class ObserverSetup:
    """An observer with what it looks at."""

    farm: Farm
    supervisor: FakeSupervisor
    observer: Observer
    crashes: int = 1
    """Of every slot's record."""
    desired_slots: tuple[str, ...] = ("w1", "w2")

    def observe(self, **states: str) -> dict[str, Observation]:
        records = {
            id_: Record(state=cast(Any, state), crashes=self.crashes)
            for id_, state in states.items()
        }
        plan_ = self.farm.plan
        starts = {
            slot.id: Start(self.farm.current, plan_.device_of(slot))
            for slot in plan_.slots
            if slot.id in self.desired_slots
        }
        external = tuple(records) if self.farm.is_external else ()
        return self.observer.observe(Memory(records), starts, external)


@pytest.fixture
def make_setup() -> Iterator[Callable[..., ObserverSetup]]:
    made = []

    def make(tmp_path: Path, device: Device, **changes: Any) -> ObserverSetup:
        supervisor = FakeSupervisor()
        supervisor.set("w1", "STOPPED")
        supervisor.set("w2", "STOPPED")
        observed = farm(tmp_path, device, **changes)
        observer = Observer(observed, cast(Supervisor, supervisor))
        made.append((observed, supervisor))
        return ObserverSetup(observed, supervisor, observer)

    yield make
    for observed, supervisor in made:
        for port in observed.ports:
            supervisor.held.release(port)


MakeSetup = Callable[..., ObserverSetup]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setattr(Driver, "open", lambda: fake)
    return fake


def test_an_ended_slot_has_an_exit_reason(tmp_path: Path, make_setup: MakeSetup) -> None:
    setup = make_setup(tmp_path, CPU)
    setup.supervisor.set("w1", "RUNNING", pid=41)
    setup.supervisor.set("w2", "STOPPING", pid=42)
    alive = setup.observe(w1="starting", w2="draining")
    assert (alive["w1"].alive, alive["w1"].pid, alive["w1"].stopping) == (True, 41, False)
    assert (alive["w1"].started, alive["w2"].stopping) == (1.0, True)
    (tmp_path / "logs/w1.log").write_text("loading\nweights are missing\n\n")
    setup.supervisor.set("w1", "EXITED", exit_code=3)
    ended = setup.observe(w1="starting", w2="draining")["w1"]
    assert (ended.alive, ended.exit_code, ended.exit_reason) == (False, 3, "weights are missing")


def test_a_slot_that_never_ran_has_no_exit_code(tmp_path: Path, make_setup: MakeSetup) -> None:
    never = make_setup(tmp_path, CPU).observe(w1="starting")["w1"]
    assert (never.started, never.exit_code) == (0.0, None)


def test_slots_of_a_larger_plan_are_observed_too_and_other_programs_are_not(
    tmp_path: Path, make_setup: MakeSetup
) -> None:
    setup = make_setup(tmp_path, CPU)
    setup.desired_slots = ("w1",)
    setup.supervisor.set("w2", "RUNNING", pid=42)
    for name in ("nginx", "controller", "worker", "w"):
        setup.supervisor.set(name, "RUNNING", pid=43)
    observed = setup.observe(w2="ready")
    assert set(observed) == {"w1", "w2"}
    assert observed["w2"].alive


def test_a_gpu_is_clear_when_the_dead_process_has_left_it_and_has_room_when_enough_is_free(
    tmp_path: Path, driver: FakeDriver, make_setup: MakeSetup
) -> None:
    setup = make_setup(tmp_path, GPU)
    setup.supervisor.set("w1", "RUNNING", pid=41)
    setup.observe(w1="ready")
    setup.supervisor.set("w1", "EXITED", exit_code=-1)
    driver.holders = (Tenant(41, "python", 7 * GIB),)
    assert not setup.observe(w1="stopped")["w1"].clear
    driver.holders, driver.bytes_free = (), 6 * GIB
    short = setup.observe(w1="stopped")["w1"]
    assert short.clear
    assert "it needs 7 GiB of A card, and 6 GiB are free" in short.no_room
    driver.bytes_free = 8 * GIB
    assert setup.observe(w1="stopped")["w1"].no_room == ""


def test_a_driver_that_lists_a_dead_process_is_not_waited_for_for_ever(
    tmp_path: Path, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, make_setup: MakeSetup
) -> None:
    setup = make_setup(tmp_path, GPU)
    setup.supervisor.set("w1", "RUNNING", pid=41)
    setup.observe(w1="ready")
    setup.supervisor.set("w1", "EXITED", exit_code=-1)
    driver.holders = (Tenant(41, "python", 7 * GIB),)
    assert not setup.observe(w1="stopped")["w1"].clear
    monkeypatch.setattr(observe, "MEMORY_SECONDS", 0.0)
    assert setup.observe(w1="stopped")["w1"].clear


def test_a_scale_is_refused_with_the_memory_that_is_free_now(
    tmp_path: Path, driver: FakeDriver
) -> None:
    generation = farm(tmp_path, GPU).current
    headroom = generation.plan.devices[0].headroom
    driver.bytes_free = 14 * GIB + headroom
    assert refusal_for(generation, ["GPU-1", "GPU-1"]) == ""
    assert refusal_for(generation, []) == ""
    assert "they need 21 GiB of A card" in refusal_for(generation, ["GPU-1"] * 3)
    driver.bytes_free -= 1
    assert refusal_for(generation, ["GPU-1", "GPU-1"]) != ""


def test_what_has_the_port_is_named(tmp_path: Path, make_setup: MakeSetup) -> None:
    setup = make_setup(tmp_path, CPU)
    port = setup.farm.port_of("w1")
    with socket.create_server(("127.0.0.1", port)):
        assert str(port) in setup.observe(w1="stopped")["w1"].taken_by
        assert str(psutil.Process().pid) in listener_of(port)
    assert setup.observe(w1="stopped")["w1"].taken_by == ""


def test_the_ports_of_empty_slots_are_held(tmp_path: Path, make_setup: MakeSetup) -> None:
    setup = make_setup(tmp_path, CPU)
    setup.desired_slots = ()
    setup.observe()
    for port in setup.farm.ports:
        with pytest.raises(OSError, match="in use"):
            socket.create_server(("127.0.0.1", port))


@pytest.mark.parametrize("external", [False, True])
def test_the_port_of_an_external_server_is_left_to_it_while_it_runs(
    tmp_path: Path, external: bool, make_setup: MakeSetup
) -> None:
    command = {"model__command": ["server", "{port}"], "footprint__bytes": "1GiB"}
    changes = {**command, "model__target": ""} if external else {}
    setup = make_setup(tmp_path, CPU, **changes)
    setup.observe(w1="stopped")
    port = setup.farm.port_of("w1")
    setup.supervisor.held.release(port)  # as the controller does before it starts one
    setup.supervisor.set("w1", "RUNNING", pid=41)
    setup.observe(w1="starting")
    assert ports.is_free(port) is external
    setup.supervisor.set("w1", "EXITED")
    setup.observe(w1="starting")
    assert not ports.is_free(port)


@pytest.fixture
def left_behind(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process as a worker w1 of this farm would have started it."""
    marks = {MARK: str(tmp_path.resolve()), "SUPERVISOR_PROCESS_NAME": "w1"}
    process = subprocess.Popen(["sleep", "100"], env={"PATH": "/usr/bin:/bin", **marks})
    # While it is being executed it has its name already, and no environment yet.
    until(lambda: marks.items() <= psutil.Process(process.pid).environ().items(), "it has started")
    yield process
    process.kill()
    process.wait()


def test_what_a_dead_worker_left_behind_is_ended_before_the_next_start(
    tmp_path: Path, left_behind: subprocess.Popen[bytes], make_setup: MakeSetup
) -> None:
    setup = make_setup(tmp_path, CPU)
    setup.observe(w1="ready", w2="stopped")
    assert left_behind.poll() is None, "it belongs to another slot"
    assert setup.observe(w1="stopped")["w1"].clear
    assert left_behind.wait(10) == -9


def test_a_drained_server_may_finish_behind_its_shell(
    tmp_path: Path, left_behind: subprocess.Popen[bytes], make_setup: MakeSetup
) -> None:
    setup = make_setup(tmp_path, CPU)
    setup.crashes = 0
    assert not setup.observe(w1="stopped")["w1"].clear
    assert left_behind.poll() is None


def test_leftovers_are_known_by_the_mark_of_their_farm_and_others_are_not(
    tmp_path: Path, left_behind: subprocess.Popen[bytes]
) -> None:
    environment = {"PATH": "/usr/bin:/bin", MARK: str(tmp_path.resolve() / "other")}
    with subprocess.Popen(["sleep", "100"], env=environment) as stranger:
        assert [process.pid for process in leftovers.marked(tmp_path)] == [left_behind.pid]
        assert [process.pid for process in leftovers.marked(tmp_path, "w1")] == [left_behind.pid]
        assert leftovers.marked(tmp_path, "w2") == []
        assert leftovers.marked(tmp_path / "another") == []
        begun = time.monotonic()
        assert leftovers.clean(tmp_path, graceful_seconds=20) == 1
        assert time.monotonic() - begun < 15
        assert not psutil.pid_exists(left_behind.pid)
        assert stranger.poll() is None
        stranger.kill()


def test_leftovers_are_found_through_a_link_and_when_everything_else_has_vanished(
    tmp_path: Path,
) -> None:
    state, link = tmp_path / "state", tmp_path / "link"
    state.mkdir()
    link.symlink_to(state)
    given = supervisor_environment(link, {"PATH": "/usr/bin:/bin", "GPUFARM_FARM": "/another"})
    with subprocess.Popen(["sleep", "100"], env=given) as process:
        try:
            for path in (state, link):
                found = until(lambda path=path: leftovers.marked(path), "it has started")  # type: ignore[misc]
                assert [orphan.pid for orphan in found] == [process.pid]
            link.unlink()
            state.rmdir()
            assert [orphan.pid for orphan in leftovers.marked(state)] == [process.pid]
        finally:
            process.kill()


def test_a_command_inside_of_a_farm_is_no_orphan_of_it(tmp_path: Path) -> None:
    """Neither itself nor what started it, which carry the mark as well."""
    code = (
        "import sys; from pathlib import Path; from launcher.supervision import leftovers\n"
        "print([p.pid for p in leftovers.marked(Path(sys.argv[1]))])"
    )
    done = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" "$2"; exit', sys.executable, code, str(tmp_path)],
        env={**os.environ, MARK: str(tmp_path.resolve())},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == "[]"


def test_a_pid_that_was_used_again_is_not_signalled(left_behind: subprocess.Popen[bytes]) -> None:
    impostor = psutil.Process(left_behind.pid)
    impostor._create_time = 1.0  # type: ignore[attr-defined]
    impostor._ident = (left_behind.pid, 1.0)  # type: ignore[attr-defined]
    leftovers.end([impostor], graceful_seconds=0.2)
    assert left_behind.poll() is None


def test_memory_is_the_whole_trees_or_the_gpus(driver: FakeDriver) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        children = until(lambda: psutil.Process(process.pid).children(), "it has a child")
        assert tree_pss(process.pid) > psutil.Process(process.pid).memory_full_info().pss
        assert device_memory({"w1": (process.pid, "cpu")})["w1"] > 2**20
        driver.holders = (Tenant(children[0].pid, "", 5 * GIB), Tenant(1, "", 3 * GIB))
        assert device_memory({"w1": (process.pid, "GPU-1")}) == {"w1": 5 * GIB}
        mixed = device_memory({"w1": (process.pid, "GPU-1"), "w2": (process.pid, "cpu")})
        assert mixed["w1"] == 5 * GIB > mixed["w2"] > 2**20
        process.communicate(b"\n")
    assert tree_pss(process.pid) == 0


def test_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert exit_reason(log) == ""
    log.write_text("x" * 10000 + "\n" + "the end " + "y" * 1000 + "\n \n")
    assert exit_reason(log).startswith("the end")
    assert len(exit_reason(log)) == 300
    log.write_text("2026-01-02T03:04:05.678Z ERROR w1 cannot load: there are no weights\n")
    assert exit_reason(log) == "there are no weights"
    log.write_text("2026-01-02T03:04:05.678Z INFO w1 ready url=http://127.0.0.1:1\n")
    assert exit_reason(log) == "", "it says nothing about an end"
    record = {"time": "2026-01-02T03:04:05.678Z", "process": "w1", "level": "ERROR"}
    log.write_text(json.dumps(record | {"message": "cannot load: there are no weights"}) + "\n")
    assert exit_reason(log) == "there are no weights"
    log.write_text(json.dumps(record | {"level": "INFO", "message": "ready"}) + "\n")
    assert exit_reason(log) == ""
    log.write_text('{"error": "no weights"}\n')
    assert exit_reason(log) == '{"error": "no weights"}'
    external = "2026-01-02T03:04:05.678Z INFO server exiting: CUDA error 700"
    log.write_text(f"{external}\n")
    assert exit_reason(log) == external, "lines of other programs are unchanged"


def test_the_exit_reason_is_that_of_the_process_that_ended(tmp_path: Path) -> None:
    """The log outlives many processes, and a crash without a word must not quote another's."""
    log = tmp_path / "w1.log"
    log.write_text("an older process could not load\n")
    os.utime(log, (1000, 1000))
    assert exit_reason_since(log, 1001) == ""
    assert exit_reason_since(log, 1000) == "an older process could not load"
    assert exit_reason_since(tmp_path / "w2.log", 0) == ""
