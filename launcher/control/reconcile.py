"""What to do next, decided from what is wanted and what is seen. Pure: no clock, no process.

One place decides about every worker: it starts them one at a time, each behind the readiness of
the one before, replaces those that crash, gives up those that cannot load, and replaces all of
them in turn without going below what serves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from launcher.planning.footprint import CANNOT_LOAD

State = Literal["stopped", "starting", "ready", "draining", "failed"]

FIRST_BACKOFF = 0.1
LONGEST_BACKOFF = 30.0
"""Seconds between a crash and the next start: doubled by every crash in a row."""
CALM_SECONDS = 30.0
"""A worker that has served for so long has its crashes forgiven."""
MOST_EARLY_CRASHES = 5
"""A worker that was never ready is given up after so many starts."""
EARLY_BACKOFF_FACTOR = 10
"""A crash while loading costs a whole load, so the next try waits longer."""


@dataclass(frozen=True)
class Place:
    """A slot, as far as decisions need it."""

    id: str
    device: str


@dataclass(frozen=True)
class Desired:
    """What the user wants."""

    count: int
    drained: frozenset[str] = frozenset()
    """Slots that stay empty although they could be used."""


@dataclass(frozen=True)
class Seen:
    """One slot as it is observed now."""

    alive: bool = False
    stopping: bool = False
    """It has been told to end and has not ended yet."""
    pid: int = 0
    exit_code: int | None = None
    """Of its last process; negative when a signal ended it."""
    ready: bool = False
    """It has answered. Ignored once it was ready: a busy server may not answer its health path."""
    answered: str = ""
    """With what it has answered, while it is asked whether it is ready."""
    clear: bool = True
    """Nothing is left of its last process: no child, no device memory."""
    silent: float = 0.0
    """Seconds for which it has not answered at all; only told of servers that always can."""
    taken_by: str = ""
    """A process that is not ours and listens on its port."""
    last_words: str = ""
    """The last line that its process wrote."""


@dataclass(frozen=True)
class Record:
    """What is remembered of one slot."""

    state: State = "stopped"
    pid: int = 0
    since: float = 0.0
    """When it came into its state (monotonic seconds)."""
    restarts: int = 0
    """How often it was started again because it had ended by itself."""
    crashes: int = 0
    """Crashes in a row."""
    retry_at: float = 0.0
    proven: bool = False
    """It has been ready before, so what ails it is not that it cannot load."""
    ready_seconds: float | None = None
    """How long its last start took until it was ready."""
    error: str = ""
    spec: str = ""
    """Digest of what it was started with."""
    overdue: bool = False
    """It was ended because it was not ready in time, or answered no more."""


@dataclass(frozen=True)
class Roll:
    """A rolling restart that is under way."""

    pending: tuple[tuple[str, int], ...] = ()
    """Slots whose worker with this pid is still to be replaced, in order."""
    extra: str = ""
    """The empty slot that serves meanwhile."""
    error: str = ""
    """Why the last one was given up."""


@dataclass(frozen=True)
class Memory:
    """Everything that is carried from one decision to the next."""

    records: Mapping[str, Record] = field(default_factory=dict)
    roll: Roll = field(default_factory=Roll)
    replaced: Mapping[str, int] = field(default_factory=dict)
    """How many workers were started again, by reason: crash, restart."""

    def of(self, id_: str) -> Record:
        return self.records.get(id_, Record())

    def with_record(self, id_: str, record: Record) -> Memory:
        return replace(self, records={**self.records, id_: record})


@dataclass(frozen=True)
class Action:
    """``start``, ``drain`` (SIGTERM, and time to finish) or ``kill``."""

    do: Literal["start", "drain", "kill"]
    id: str


@dataclass(frozen=True)
class Decision:
    memory: Memory
    actions: tuple[Action, ...] = ()


def wanted(places: Sequence[Place], desired: Desired) -> tuple[str, ...]:
    """The slots that should have a worker: the first ``count`` that are not drained."""
    usable = [place.id for place in places if place.id not in desired.drained]
    return tuple(usable[: desired.count])


def backoff(crashes: int, early: bool) -> float:
    """Seconds to wait after the ``crashes``-th crash in a row."""
    first = FIRST_BACKOFF * (EARLY_BACKOFF_FACTOR if early else 1)
    return float(min(LONGEST_BACKOFF, first * 2.0 ** (crashes - 1)))


def settled(places: Sequence[Place], desired: Desired, memory: Memory) -> bool:
    """Whether there is nothing left to do: all wanted are ready or given up, nothing rolls."""
    alive = {id_ for id_, record in memory.records.items() if record.state not in _RESTING}
    ids = set(wanted(places, desired))
    device = {place.id: place.device for place in places}
    done = all(
        memory.of(id_).state in ("ready", "failed")
        or (memory.of(id_).state == "stopped" and _hopeless(device[id_], device, memory))
        for id_ in ids
    )
    return done and alive <= ids and not memory.roll.pending


_RESTING = ("stopped", "failed")


def decide(
    places: Sequence[Place],
    desired: Desired,
    memory: Memory,
    seen: Mapping[str, Seen],
    *,
    now: float,
    load_timeout: float,
    silence: float = float("inf"),
    spec: str = "",
) -> Decision:
    """The next actions, and what to remember. Every action is to be carried out before the next
    call, which then sees its effect.

    ``silence``: seconds after which a worker that does not answer is taken for a hanging one."""
    actions: list[Action] = []
    for place in places:
        old = memory.of(place.id)
        sight = seen.get(place.id, Seen())
        new = _observe(place.id, old, sight, now)
        if _overdue(new, now, load_timeout):
            said = f": {sight.answered}" if sight.answered else ""
            error = f"{place.id} was not ready within {load_timeout:g} s{said}"
            new = replace(new, overdue=True, error=error)
            actions.append(Action("kill", place.id))
        if new.state == "ready" and sight.silent > silence and not new.overdue:
            error = f"{place.id} did not answer for {sight.silent:.0f} s, and was killed"
            new = replace(new, overdue=True, error=error)
            actions.append(Action("kill", place.id))
        memory = memory.with_record(place.id, new)

    ids = wanted(places, desired)
    memory, roll_actions = _roll(places, desired, ids, memory, now)
    actions += roll_actions
    if memory.roll.extra:
        ids = (*ids, memory.roll.extra)
    memory, surplus = _drain_surplus(ids, memory, now)
    actions += surplus
    memory, started = _start_next(places, ids, memory, seen, now=now, spec=spec)
    return Decision(memory, (*actions, *started))


def _overdue(record: Record, now: float, load_timeout: float) -> bool:
    late = record.state == "starting" and now - record.since > load_timeout
    return late and not record.overdue


def _observe(id_: str, record: Record, seen: Seen, now: float) -> Record:
    """What has become of a slot since the last look."""
    if record.state in _RESTING:
        if not seen.alive:
            return record
        # Not started by us: a controller before us did, or an operator.
        state: State = "draining" if seen.stopping else "starting"
        record = replace(record, state=state, pid=seen.pid, since=now, overdue=False)
    elif not seen.alive or (record.pid and seen.pid != record.pid):
        return _ended(id_, record, seen, now)
    if not record.pid:
        record = replace(record, pid=seen.pid)
    if seen.stopping and record.state != "draining":
        return replace(record, state="draining", since=now)
    if record.state == "starting" and seen.ready and not record.overdue:
        took = round(now - record.since, 3)
        return replace(record, state="ready", since=now, ready_seconds=took, proven=True, error="")
    if record.state == "ready" and record.crashes and now - record.since > CALM_SECONDS:
        return replace(record, crashes=0)
    return record


def _ended(id_: str, record: Record, seen: Seen, now: float) -> Record:
    """A worker's process is gone: as told, for good, or to be replaced."""
    gone = replace(record, pid=0, since=now, overdue=False)
    if record.state == "draining" and not record.overdue:
        return replace(gone, state="stopped", crashes=0, retry_at=now, error="")
    words = f": {seen.last_words}" if seen.last_words else ""
    early = record.state == "starting"
    if early and seen.exit_code == CANNOT_LOAD and not record.overdue:
        return replace(gone, state="failed", error=f"{id_} could not load{words}")
    crashes = record.crashes + 1
    how = _how(seen.exit_code)
    error = record.error if record.overdue else f"{id_} ended {how}{words}"
    if early and not record.proven:
        if record.overdue:
            return replace(gone, state="failed")
        if crashes >= MOST_EARLY_CRASHES:
            error = f"{id_} ended {crashes} times before it was ready, last {how}{words}"
            return replace(gone, state="failed", crashes=crashes, error=error)
    wait = backoff(crashes, early)
    return replace(gone, state="stopped", crashes=crashes, retry_at=now + wait, error=error)


def _how(exit_code: int | None) -> str:
    if exit_code is None or exit_code < 0:
        return "by a signal"
    return f"with exit code {exit_code}"


def _roll(
    places: Sequence[Place],
    desired: Desired,
    ids: tuple[str, ...],
    memory: Memory,
    now: float,
) -> tuple[Memory, list[Action]]:
    """Carry a rolling restart one step further."""
    roll = memory.roll
    pending = tuple(
        (id_, pid)
        for id_, pid in roll.pending
        if id_ in ids and not (memory.of(id_).state == "ready" and memory.of(id_).pid != pid)
    )
    failed = [id_ for id_, _ in pending if memory.of(id_).state == "failed"]
    if roll.extra and memory.of(roll.extra).state == "failed":
        failed.append(roll.extra)
    if failed:
        # What the new one cannot do, the others would not do either: leave them as they are.
        error = f"the restart was given up: {memory.of(failed[0]).error}"
        if roll.extra in failed:
            memory = memory.with_record(roll.extra, Record(since=now))
        return replace(memory, roll=Roll(error=error)), []
    if not pending:
        return replace(memory, roll=Roll(error=roll.error)), []

    extra = roll.extra or _empty_slot(places, desired, ids, memory)
    memory = replace(memory, roll=Roll(pending, extra, roll.error))
    id_, pid = pending[0]
    record = memory.of(id_)
    if record.pid != pid or record.state not in ("ready", "starting"):
        return memory, []  # it is ending, or its successor is starting
    others = [memory.of(other) for other in (*ids, extra) if other and other != id_]
    calm = all(other.state in ("ready", "failed") for other in others)
    covered = not others or any(other.state == "ready" for other in others)
    if not (calm and covered):
        return memory, []
    replaced = {**memory.replaced, "restart": memory.replaced.get("restart", 0) + 1}
    memory = replace(
        memory.with_record(id_, replace(record, state="draining", since=now)), replaced=replaced
    )
    return memory, [Action("drain", id_)]


def _empty_slot(
    places: Sequence[Place], desired: Desired, ids: tuple[str, ...], memory: Memory
) -> str:
    for place in places:
        free = place.id not in ids and place.id not in desired.drained
        if free and memory.of(place.id).state == "stopped":
            return place.id
    return ""


def _drain_surplus(ids: Iterable[str], memory: Memory, now: float) -> tuple[Memory, list[Action]]:
    """End workers that are not wanted, but never the last one that serves."""
    keep = set(ids)
    serving = any(memory.of(id_).state == "ready" for id_ in keep)
    actions = []
    for id_, record in memory.records.items():
        if id_ in keep or record.state not in ("starting", "ready"):
            continue
        if record.state == "ready" and keep and not serving:
            continue
        memory = memory.with_record(id_, replace(record, state="draining", since=now))
        actions.append(Action("drain", id_))
    return memory, actions


def _start_next(
    places: Sequence[Place],
    ids: Sequence[str],
    memory: Memory,
    seen: Mapping[str, Seen],
    *,
    now: float,
    spec: str,
) -> tuple[Memory, list[Action]]:
    """Start one worker, if none is starting."""
    if any(record.state == "starting" for record in memory.records.values()):
        return memory, []
    device = {place.id: place.device for place in places}
    for id_ in ids:
        record, sight = memory.of(id_), seen.get(id_, Seen())
        due = record.state == "stopped" and record.retry_at <= now
        if not due or sight.alive or not sight.clear or _hopeless(device[id_], device, memory):
            continue
        if sight.taken_by:
            error = f"{id_} cannot start: its port is taken by {sight.taken_by}"
            memory = memory.with_record(id_, replace(record, state="failed", error=error))
            continue
        again = record.crashes > 0
        started = replace(
            record,
            state="starting",
            pid=0,
            since=now,
            spec=spec,
            restarts=record.restarts + again,
            proven=record.proven and record.spec == spec,
        )
        memory = memory.with_record(id_, started)
        if again:
            counts = {**memory.replaced, "crash": memory.replaced.get("crash", 0) + 1}
            memory = replace(memory, replaced=counts)
        return memory, [Action("start", id_)]
    return memory, []


def _hopeless(device: str, devices: Mapping[str, str], memory: Memory) -> bool:
    """A worker could not load on this device, and none runs there: more would fail as well."""
    states = [memory.of(id_).state for id_, on in devices.items() if on == device]
    return "failed" in states and "ready" not in states
