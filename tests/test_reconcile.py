"""Decisions under a clock of our own: a small world of processes that do as they are told."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest

from launcher.control.reconcile import (
    CALM_SECONDS,
    LONGEST_BACKOFF,
    MOST_EARLY_CRASHES,
    Desired,
    Memory,
    Place,
    Record,
    Roll,
    Seen,
    State,
    backoff,
    decide,
    settled,
    wanted,
)

LOAD_TIMEOUT = 60.0
SILENCE = 20.0
STEP = 0.5


@dataclass
class Process:
    pid: int
    ready_at: float
    ends_at: float | None = None
    exit_code: int = 0


@dataclass
class World:
    """Slots, processes and a clock."""

    slots: int = 4
    count: int = 2
    load_seconds: float = 5.0
    drain_seconds: float = 2.0
    devices: tuple[str, ...] = ("gpu0",)
    now: float = 100.0
    memory: Memory = field(default_factory=Memory)
    drained: frozenset[str] = frozenset()
    alive: dict[str, Process] = field(default_factory=dict)
    exits: dict[str, int] = field(default_factory=dict)
    fails: dict[str, int] = field(default_factory=dict)
    """Slot → exit code with which its workers end as soon as they have loaded."""
    unclear: set[str] = field(default_factory=set)
    taken: dict[str, str] = field(default_factory=dict)
    frozen: dict[str, float] = field(default_factory=dict)
    """Slot → since when its worker answers nothing."""
    started: list[str] = field(default_factory=list)
    drains: list[str] = field(default_factory=list)
    next_pid: int = 1000
    fewest_ready: int = 99

    @property
    def places(self) -> list[Place]:
        return [Place(f"w{n + 1}", self.devices[n % len(self.devices)]) for n in range(self.slots)]

    @property
    def desired(self) -> Desired:
        return Desired(self.count, self.drained)

    def state(self, id_: str) -> State:
        return self.memory.of(id_).state

    def states(self) -> str:
        return " ".join(self.state(place.id) for place in self.places)

    def ready(self) -> list[str]:
        """Workers that take requests: loaded, and not told to end."""
        return [
            id_
            for id_, process in self.alive.items()
            if process.ready_at <= self.now and process.ends_at is None
        ]

    def see(self) -> dict[str, Seen]:
        for id_, process in list(self.alive.items()):
            if process.ready_at <= self.now and id_ in self.fails and process.ends_at is None:
                process.ends_at, process.exit_code = self.now, self.fails[id_]
            if process.ends_at is not None and process.ends_at <= self.now:
                self.exits[id_] = self.alive.pop(id_).exit_code
        return {place.id: self._see(place.id) for place in self.places}

    def _see(self, id_: str) -> Seen:
        process = self.alive.get(id_)
        if process is None:
            clear = id_ not in self.unclear
            taken = self.taken.get(id_, "")
            code = self.exits.get(id_)
            return Seen(exit_code=code, clear=clear, taken_by=taken, last_words="no such file")
        stopping = process.ends_at is not None
        ready = process.ready_at <= self.now
        silent = self.now - self.frozen.get(id_, self.now)
        return Seen(alive=True, stopping=stopping, pid=process.pid, ready=ready, silent=silent)

    def step(self) -> None:
        decision = decide(
            self.places,
            self.desired,
            self.memory,
            self.see(),
            now=self.now,
            load_timeout=LOAD_TIMEOUT,
            silence=SILENCE,
            spec="spec",
        )
        self.memory = decision.memory
        for action in decision.actions:
            if action.do == "start":
                assert action.id not in self.alive
                self.next_pid += 1
                self.alive[action.id] = Process(self.next_pid, self.now + self.load_seconds)
                self.started.append(action.id)
            else:
                process = self.alive[action.id]
                process.ends_at = self.now + (self.drain_seconds if action.do == "drain" else 0)
                process.exit_code = 0 if action.do == "drain" else -9
                self.drains.append(action.id)
        starting = [
            id_ for id_, p in self.alive.items() if p.ready_at > self.now and p.ends_at is None
        ]
        assert len(starting) <= 1, f"one at a time, not {starting}"
        self.fewest_ready = min(self.fewest_ready, len(self.ready()))

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / STEP)):
            self.step()
            self.now += STEP

    def crash(self, id_: str, exit_code: int = -9) -> None:
        self.alive[id_].ends_at, self.alive[id_].exit_code = self.now, exit_code

    def roll(self, *ids: str) -> None:
        pending = tuple((id_, self.alive[id_].pid) for id_ in ids)
        self.memory = replace(self.memory, roll=Roll(pending))

    def settled(self) -> bool:
        return settled(self.places, self.desired, self.memory)


def running(**changes: object) -> World:
    world = World(**changes)  # type: ignore[arg-type]
    world.run(60)
    assert world.settled()
    world.fewest_ready = 99
    return world


def test_workers_start_one_at_a_time_each_behind_the_one_before() -> None:
    world = World(count=3)
    world.step()
    assert world.states() == "starting stopped stopped stopped"
    world.run(5)
    assert world.started == ["w1"]
    world.run(11)
    assert world.states() == "ready ready ready stopped"
    assert world.memory.of("w3").ready_seconds == pytest.approx(5, abs=STEP)
    assert world.settled()


def test_scaling_up_and_down() -> None:
    world = running(count=1)
    world.count = 3
    assert not world.settled()
    world.run(20)
    assert world.states() == "ready ready ready stopped"
    world.count = 1
    world.step()
    assert world.states() == "ready draining draining stopped", "the highest go, together"
    world.run(5)
    assert world.states() == "ready stopped stopped stopped"
    assert world.memory.of("w3").restarts == 0
    assert world.settled()


def test_scaling_down_never_ends_the_only_worker_that_serves() -> None:
    world = running(count=2)
    world.crash("w1")
    world.count = 1
    world.run(3)
    assert world.states() == "starting ready stopped stopped"
    world.run(10)
    assert world.states() == "ready stopped stopped stopped"


def test_a_worker_that_hangs_is_killed_once_and_replaced() -> None:
    world = running(count=2)
    world.frozen["w1"] = world.now
    world.run(SILENCE)
    assert world.states().startswith("ready ready"), "busy is not hanging"
    world.run(2 * STEP)
    assert world.drains == ["w1"]
    assert "w1 did not answer for 20 s" in world.memory.of("w1").error
    del world.frozen["w1"]
    world.run(world.load_seconds + 2)
    assert world.states().startswith("ready ready")
    assert world.memory.of("w1").restarts == 1
    assert world.memory.of("w1").error == ""


def test_a_crashed_worker_is_back_within_its_load_time_and_two_seconds() -> None:
    world = running(count=2)
    world.crash("w2")
    world.run(STEP)
    world.run(world.load_seconds + 1)
    assert world.states().startswith("ready ready")
    assert world.memory.of("w2").restarts == 1
    assert world.memory.replaced == {"crash": 1}
    assert world.memory.of("w2").error == ""


def test_a_replacement_waits_until_its_memory_has_returned() -> None:
    world = running(count=2)
    world.unclear.add("w2")
    world.crash("w2")
    world.run(20)
    assert world.states() == "ready stopped stopped stopped"
    assert "ended by a signal" in world.memory.of("w2").error
    world.unclear.clear()
    world.run(7)
    assert world.states() == "ready ready stopped stopped"


def test_backoff_doubles_to_its_limit_and_is_forgiven_after_calm() -> None:
    assert [backoff(n, early=False) for n in (1, 2, 3)] == [0.1, 0.2, 0.4]
    assert backoff(20, early=False) == LONGEST_BACKOFF
    world = running(count=1, load_seconds=0.0)
    for crashes in range(1, 6):
        world.crash("w1", 1)
        world.run(5)
        assert world.memory.of("w1").crashes == crashes
    assert world.memory.of("w1").restarts == 5
    world.run(CALM_SECONDS + 1)
    assert world.memory.of("w1").crashes == 0


def test_a_worker_that_cannot_load_fails_once_and_takes_no_other_with_it() -> None:
    world = World(count=3, fails={"w1": 3})
    world.run(60)
    assert world.started == ["w1"]
    assert world.states() == "failed stopped stopped stopped"
    assert world.memory.of("w1").error == "w1 could not load: no such file"
    assert world.settled(), "there is nothing to wait for"


def test_a_device_on_which_nothing_loads_does_not_hold_up_the_others() -> None:
    world = World(count=4, devices=("gpu0", "gpu1"), fails={"w1": 3, "w3": 3})
    world.run(60)
    assert world.states() == "failed ready stopped ready"
    assert world.started == ["w1", "w2", "w4"]


def test_a_worker_that_crashes_while_loading_is_given_up_after_a_few_tries() -> None:
    world = World(count=1, fails={"w1": 1})
    world.run(300)
    assert len(world.started) == MOST_EARLY_CRASHES
    assert world.states().startswith("failed")
    assert "before it was ready, last with exit code 1" in world.memory.of("w1").error
    assert world.settled()


def test_a_worker_that_has_loaded_before_is_tried_for_ever() -> None:
    world = running(count=1)
    world.fails = {"w1": 1}
    world.run(600)
    assert len(world.started) > MOST_EARLY_CRASHES + 3
    world.fails = {}
    world.run(60)
    assert world.states().startswith("ready")


def test_a_load_has_a_deadline() -> None:
    world = World(count=1, load_seconds=1e9)
    world.run(LOAD_TIMEOUT - 1)
    assert world.states().startswith("starting")
    world.run(5)
    assert world.states().startswith("failed")
    assert world.memory.of("w1").error == "w1 was not ready within 60 s"
    assert world.alive == {}


def test_a_stranger_on_the_port_is_a_failure_that_names_it() -> None:
    world = World(count=1, taken={"w1": "pid 42 (python)"})
    world.run(5)
    assert world.started == []
    assert "its port is taken by pid 42 (python)" in world.memory.of("w1").error


def test_a_drained_slot_stays_empty_and_the_next_takes_over_when_asked() -> None:
    world = running(count=3)
    world.drained, world.count = frozenset({"w2"}), 2
    world.run(20)
    assert world.states() == "ready stopped ready stopped"
    world.count = 3
    world.run(20)
    assert world.states() == "ready stopped ready ready"
    assert wanted(world.places, world.desired) == ("w1", "w3", "w4")


def test_a_rolling_restart_starts_a_new_worker_first_where_a_slot_is_empty() -> None:
    world = running(count=2)
    pids = {id_: process.pid for id_, process in world.alive.items()}
    world.roll("w1", "w2")
    assert not world.settled()
    world.run(60)
    assert world.settled()
    assert world.fewest_ready == 2
    assert world.states() == "ready ready stopped stopped"
    assert world.started[2:] == ["w3", "w1", "w2"]
    assert all(world.alive[id_].pid != pid for id_, pid in pids.items())
    assert world.memory.replaced == {"restart": 2}
    assert world.memory.of("w1").restarts == 0


@pytest.mark.parametrize("count", [2, 3])
def test_a_rolling_restart_without_an_empty_slot_keeps_the_others(count: int) -> None:
    world = running(count=count, slots=count)
    world.roll(*world.alive)
    world.run(100)
    assert world.settled()
    assert world.fewest_ready == count - 1
    assert len(world.started) == 2 * count


def test_the_only_worker_of_the_only_slot_is_drained_first() -> None:
    world = running(count=1, slots=1)
    world.roll("w1")
    world.run(20)
    assert world.settled()
    assert world.started == ["w1", "w1"]


def test_a_restart_into_something_that_cannot_load_leaves_the_old_workers() -> None:
    world = running(count=2)
    pids = {id_: process.pid for id_, process in world.alive.items()}
    world.fails = {"w3": 3}
    world.roll("w1", "w2")
    world.run(60)
    assert {id_: process.pid for id_, process in world.alive.items()} == pids
    assert "w3 could not load: no such file" in world.memory.roll.error
    assert world.settled()


def test_a_crash_during_a_rolling_restart_is_mended_before_it_goes_on() -> None:
    world = running(count=3, slots=3)
    world.roll("w1", "w2", "w3")
    world.step()
    world.crash("w2")
    world.run(200)
    assert world.settled()
    assert world.states() == "ready ready ready"
    assert world.fewest_ready >= 1


def test_a_busy_server_that_no_longer_answers_is_left_alone() -> None:
    world = running(count=1)
    process = world.alive["w1"]
    process.ready_at = world.now + 1e6
    world.run(500)
    assert world.states().startswith("ready")
    assert world.drains == []
    process.ready_at = 0


def test_a_new_controller_takes_over_what_runs() -> None:
    world = running(count=2)
    pids = {id_: process.pid for id_, process in world.alive.items()}
    remembered = world.memory
    world.memory = Memory()  # even without any memory
    world.run(10)
    assert world.states() == "ready ready stopped stopped"
    world.memory = remembered
    world.run(10)
    assert {id_: process.pid for id_, process in world.alive.items()} == pids
    assert world.started == ["w1", "w2"]


def test_a_worker_that_an_operator_ended_comes_back() -> None:
    world = running(count=2)
    world.crash("w1", exit_code=0)
    world.run(8)
    assert world.states() == "ready ready stopped stopped"
    assert world.memory.of("w1").restarts == 1


def test_wanted_skips_drained_slots() -> None:
    places = [Place(f"w{n}", "cpu") for n in (1, 2, 3)]
    assert wanted(places, Desired(2)) == ("w1", "w2")
    assert wanted(places, Desired(2, frozenset({"w1"}))) == ("w2", "w3")
    assert wanted(places, Desired(0)) == ()
    assert wanted(places, Desired(9)) == ("w1", "w2", "w3")


def test_an_unknown_slot_has_an_empty_record() -> None:
    assert Memory().of("w9") == Record()


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_it_settles_and_starts_one_at_a_time(seed: int) -> None:
    chance = random.Random(seed)
    world = World(count=2, slots=chance.choice([2, 4, 5]), load_seconds=chance.choice([0, 2, 7]))
    for _ in range(25):
        event = chance.choice(["crash", "scale", "roll", "drain", "refill", "wait"])
        alive = sorted(world.alive)
        if event == "crash" and alive:
            world.crash(chance.choice(alive), chance.choice([-9, 0, 1]))
        elif event == "scale":
            world.count = chance.randint(0, world.slots)
        elif event == "roll" and world.ready():
            world.roll(*chance.sample(world.ready(), chance.randint(1, len(world.ready()))))
        elif event == "drain":
            world.drained |= {f"w{chance.randint(1, world.slots)}"}
        elif event == "refill":
            world.drained = frozenset()
        world.run(chance.choice([0.5, 2, 10, 40]))
    world.run(300)
    assert world.settled(), world.memory
    expected = set(wanted(world.places, world.desired))
    given_up = {id_ for id_ in expected if world.state(id_) == "failed"}
    assert set(world.ready()) == expected - given_up
