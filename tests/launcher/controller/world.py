"""A small world for decisions: slots, processes, devices and a clock, all of them plain data.

It shows `decide` what the controller would show it, carries out what is decided, or loses it, and
checks after every step what has to hold at all times.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from launcher.controller import rollout
from launcher.controller.model import (
    Action,
    Desired,
    Goal,
    Memory,
    Observation,
    Rollout,
    State,
    Target,
)
from launcher.controller.reconcile import decide, settled

LOAD_TIMEOUT = 60.0
SILENCE = 20.0
STEP = 0.5
NEVER = float("inf")


@dataclass(frozen=True)
class Version:
    """One generation of the configuration."""

    name: str = "old"
    slots: int = 4
    count: int = 2
    devices: tuple[str, ...] = ("gpu0",)
    load_seconds: float = 5.0
    need: int = 1
    """Units of its device's memory that a worker takes."""

    @property
    def targets(self) -> tuple[Target, ...]:
        devices = [self.devices[n % len(self.devices)] for n in range(self.slots)]
        return tuple(
            Target(f"w{n}", device, f"{self.name}@{device}") for n, device in enumerate(devices, 1)
        )


@dataclass
class Process:
    pid: int
    version: str
    device: str
    need: int
    ready_at: float
    ends_at: float | None = None
    exit_code: int = 0
    asked_to_end: bool = False
    """Also where the signal was lost."""

    @property
    def spec(self) -> str:
        return f"{self.version}@{self.device}"


@dataclass
class World:
    current: Version = field(default_factory=Version)
    candidate: Version | None = None
    desired: Desired = field(default_factory=Desired)
    memory: Memory = field(default_factory=Memory)
    now: float = 100.0
    drain_seconds: float = 2.0
    room: Mapping[str, int] = field(default_factory=dict)
    """Units of memory of each device; without an entry it is never short."""
    fails: dict[str, int] = field(default_factory=dict)
    """Slot, version or spec → exit code with which its workers end instead of being ready."""
    lost: float = 0.0
    """Probability with which an action is not carried out."""
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    unclear: set[str] = field(default_factory=set)
    taken: dict[str, str] = field(default_factory=dict)
    frozen: dict[str, float] = field(default_factory=dict)
    """Slot → since when its worker answers nothing."""
    alive: dict[str, Process] = field(default_factory=dict)
    exits: dict[str, int] = field(default_factory=dict)
    started_at: dict[str, float] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    """The slots of every start, in order; ``started_specs`` what was started in them."""
    started_specs: list[str] = field(default_factory=list)
    sent: list[Action] = field(default_factory=list)
    """Every action that was decided, also those that were lost."""
    verdicts: list[str] = field(default_factory=list)
    next_pid: int = 1000
    fewest_ready: int = 99

    @property
    def goal(self) -> Goal:
        return Goal.of(self.current.targets, self.current.count, self.desired)

    @property
    def candidate_goal(self) -> Goal | None:
        version = self.candidate
        return Goal.of(version.targets, version.count, self.desired) if version else None

    def state(self, id_: str) -> State:
        return self.memory.of(id_).state

    def states(self) -> str:
        return " ".join(self.state(target.id) for target in self.current.targets)

    def ready(self) -> list[str]:
        """Workers that take requests: loaded, and not signalled to end."""
        return [
            id_
            for id_, process in self.alive.items()
            if process.ready_at <= self.now and process.ends_at is None
        ]

    def specs(self) -> dict[str, str]:
        """Slot → what runs in it."""
        return {id_: self.alive[id_].spec for id_ in sorted(self.alive)}

    def pids(self) -> dict[str, int]:
        return {id_: process.pid for id_, process in self.alive.items()}

    def drains(self) -> list[str]:
        return [action.id for action in self.sent if action.do == "drain"]

    def kills(self) -> list[str]:
        return [action.id for action in self.sent if action.do == "kill"]

    def settled(self) -> bool:
        return settled(self.goal, self.candidate_goal, self.memory, self.now)

    # What a user does: as the controller's methods do it.

    def scale(self, count: int | None) -> None:
        self.memory = self.memory.reset(tuple(self.goal.by_id))
        used = None if count is None else count + len(self.goal.drained)
        self.desired = replace(self.desired, count=used)

    def drain(self, *ids: str) -> None:
        self.memory = self.memory.reset(ids)
        self.desired = replace(self.desired, drained=self.desired.drained | set(ids))

    def restart(self, *ids: str) -> None:
        self.desired = replace(self.desired, drained=self.desired.drained - set(ids))
        chosen = ids or self.goal.desired_slots
        self.memory = rollout.begin(self.memory.reset(chosen), chosen)

    def roll_out(self, version: Version) -> None:
        self.candidate = version
        ids = {target.id for target in (*self.current.targets, *version.targets)}
        self.memory = self.memory.reset(tuple(sorted(ids)))
        self.desired = replace(self.desired, drained=self.desired.drained & ids)
        assert self.candidate_goal is not None
        self.memory = replace(self.memory, rollout=Rollout())

    def crash(self, id_: str, exit_code: int = -9) -> None:
        self.alive[id_].ends_at, self.alive[id_].exit_code = self.now, exit_code

    # The world itself.

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / STEP)):
            self.step()
            self.now += STEP

    def run_until_settled(self, within: float = 600.0) -> None:
        end = self.now + within
        self.run(STEP)
        while not self.settled():
            assert self.now < end, (self.memory, self.specs())
            self.run(STEP)

    def step(self) -> None:
        decision = decide(
            self.goal,
            self.candidate_goal,
            self.memory,
            self.observe(),
            now=self.now,
            load_timeout=LOAD_TIMEOUT,
            liveness_timeout=SILENCE,
        )
        self.memory = decision.memory
        if decision.verdict:
            self.verdicts.append(decision.verdict)
            assert self.candidate is not None
            if decision.verdict == "promoted":
                self.current = self.candidate
            self.candidate = None
        for action in decision.actions:
            self.sent.append(action)
            self._execute(action, lost=self.chance.random() < self.lost)
        self._check_slot()

    def observe(self) -> dict[str, Observation]:
        for id_, process in list(self.alive.items()):
            code = self._exit_code_of_load(id_, process)
            if process.ready_at <= self.now and code is not None and process.ends_at is None:
                process.ends_at, process.exit_code = self.now, code
            if process.ends_at is not None and process.ends_at <= self.now:
                self.exits[id_] = self.alive.pop(id_).exit_code
        # supervisord goes on with the programs of the largest plan that it was ever given.
        known = {target.id for target in self.current.targets} | set(self.started_at)
        known |= {target.id for target in (self.candidate.targets if self.candidate else ())}
        return {id_: self._observe(id_) for id_ in sorted(known)}

    def _exit_code_of_load(self, id_: str, process: Process) -> int | None:
        keys = (id_, process.version, process.spec)
        return next((self.fails[key] for key in keys if key in self.fails), None)

    def _observe(self, id_: str) -> Observation:
        process, started = self.alive.get(id_), self.started_at.get(id_, 0.0)
        if process is not None:
            return Observation(
                alive=True,
                stopping=process.ends_at is not None and process.asked_to_end,
                pid=process.pid,
                started=started,
                ready=process.ready_at <= self.now,
                unresponsive=self.now - self.frozen.get(id_, self.now),
            )
        observation = Observation(
            started=started, exit_code=self.exits.get(id_), exit_reason="no such file"
        )
        # As the observer does, only a slot that may be started now is examined.
        desired_slots = rollout.desired_slots(self.goal, self.candidate_goal, self.memory)
        if id_ not in desired_slots or self.state(id_) != "stopped":
            return observation
        return replace(
            observation,
            clear=id_ not in self.unclear,
            taken_by=self.taken.get(id_, ""),
            no_room=self._no_room(id_),
        )

    def _no_room(self, id_: str) -> str:
        goal = rollout.goal_of(id_, self.goal, self.candidate_goal, self.memory)
        version = self._version_of(goal.target(id_).spec)
        free = self._free(goal.target(id_).device)
        return "" if free >= version.need else f"it needs {version.need}, and {free:g} are free"

    def _free(self, device: str) -> float:
        used = sum(process.need for process in self.alive.values() if process.device == device)
        return self.room.get(device, NEVER) - used

    def _version_of(self, spec: str) -> Version:
        name = spec.split("@", maxsplit=1)[0]
        versions = [version for version in (self.candidate, self.current) if version]
        return next(version for version in versions if version.name == name)

    def _execute(self, action: Action, lost: bool) -> None:
        process = self.alive.get(action.id)
        if process is not None and action.do != "start":
            process.asked_to_end = True
        if lost:
            return
        if action.do == "start":
            assert process is None, f"{action.id} runs already"
            self._start(action.id)
        elif process is not None and process.ends_at is None:
            process.ends_at = self.now + (self.drain_seconds if action.do == "drain" else 0)
            process.exit_code = 0 if action.do == "drain" else -9

    def _start(self, id_: str) -> None:
        record = self.memory.of(id_)
        version = self._version_of(record.spec)
        if record.since == self.now:  # one that is sent again was examined when it was decided
            assert self._free(record.device) >= version.need, f"no room for {id_}"
            assert id_ not in self.unclear, f"something is left of {id_}"
            assert id_ not in self.taken, f"the port of {id_} is taken"
        self.next_pid += 1
        self.alive[id_] = Process(
            self.next_pid,
            version.name,
            record.device,
            version.need,
            self.now + version.load_seconds,
        )
        self.started_at[id_] = self.now
        self.started.append(id_)
        self.started_specs.append(record.spec)

    def _check_slot(self) -> None:
        loading = [
            id_
            for id_, p in self.alive.items()
            if p.ready_at > self.now and p.ends_at is None and not p.asked_to_end
        ]
        assert len(loading) <= 1, f"one at a time, not {loading}"
        self.fewest_ready = min(self.fewest_ready, len(self.ready()))


def running(version: Version | None = None, **changes: object) -> World:
    """A world that has come to rest with its workers ready."""
    world = World(version or Version(), **changes)  # type: ignore[arg-type]
    world.run(120)
    assert world.settled()
    assert len(world.ready()) == len(world.goal.desired_slots)
    world.fewest_ready = 99
    world.started.clear()
    world.started_specs.clear()
    world.sent.clear()
    return world
