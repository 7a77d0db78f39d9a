"""Decide what to do next, from the desired state and what is observed. Pure: no clock, no process.

One place decides about every worker: it starts them one at a time, each behind the readiness of
the one before, replaces those that crash, drains those that are no longer wanted, and replaces all
of them in turn without going below what serves (`rollout.py`). A decision that was not carried out
is made again: what was decided is compared with what is observed, never with what was sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from launcher.config.exit_codes import CANNOT_LOAD
from launcher.controller import rollout
from launcher.controller.model import (
    MAX_EARLY_CRASHES,
    RESTING,
    Action,
    Decision,
    Goal,
    Memory,
    Observation,
    Record,
    State,
)

FIRST_BACKOFF = 0.1
MAX_BACKOFF = 30.0
"""Seconds between a crash and the next start: doubled by every crash in a row."""
CALM_SECONDS = 30.0
"""A worker that has served for so long has its crashes forgotten."""
EARLY_BACKOFF_FACTOR = 10
"""A crash while loading costs a whole load, so the next try waits longer."""


def backoff(crashes: int, early: bool) -> float:
    """Return the seconds to wait after the ``crashes``-th crash in a row."""
    first = FIRST_BACKOFF * (EARLY_BACKOFF_FACTOR if early else 1)
    return float(min(MAX_BACKOFF, first * 2.0 ** min(crashes - 1, 30)))


def settled(current: Goal, candidate: Goal | None, memory: Memory, now: float) -> bool:
    """Whether nothing more will happen by itself soon: no rollout, nothing to end, and every wanted
    slot is ready or has shown that it cannot become so for now."""
    if candidate is not None or memory.rollout.active:
        return False
    wanted = set(current.wanted)
    if any(id_ not in wanted for id_, record in memory.records.items() if record.alive):
        return False
    return all(
        memory.of(id_).state == "ready"
        or memory.of(id_).gave_up
        or memory.of(id_).blocked(now)
        or (memory.of(id_).state == "stopped" and _behind_another(current, id_, memory))
        for id_ in wanted
    )


def decide(
    current: Goal,
    candidate: Goal | None,
    memory: Memory,
    observed: Mapping[str, Observation],
    *,
    now: float,
    load_timeout: float,
    silence: float = float("inf"),
) -> Decision:
    """Return the next actions, what to remember, and what became of ``candidate``.

    ``observed``: every slot that supervisord has, also those that no plan has any more.
    ``silence``: seconds after which a worker that answers nothing is taken for a hanging one.
    """
    actions: list[Action] = []
    examined = _examined(current, candidate, memory)
    for id_ in dict.fromkeys((*memory.records, *observed)):
        seen = observed.get(id_, Observation())
        record, proven = _advance(id_, memory, seen, now)
        record = _judge_time(id_, record, seen, now, load_timeout=load_timeout, silence=silence)
        memory = replace(memory.with_record(id_, record), proven=proven)
        actions += _repeated(id_, record, seen)
    step = rollout.step(current, candidate, memory, now)
    memory, actions = step.memory, [*actions, *step.actions]
    if step.verdict == "promoted" and candidate is not None:
        current, candidate = candidate, None
    elif step.verdict == "given up":
        candidate = None
    wanted = rollout.wanted(current, candidate, memory)
    memory, surplus = _drain_surplus(wanted, memory, now)
    memory, repeated = _start_again(current, candidate, memory, observed, now)
    # A slot that becomes free in this round is not started before the next: its port, its memory
    # and its leftovers were not looked at, or for another spec.
    specs = _specs(current, candidate, memory)
    fit = {id_: seen for id_, seen in observed.items() if (id_, specs.get(id_)) in examined}
    memory, started = _start_next(current, candidate, memory, fit, now)
    return Decision(
        _pruned(current, candidate, memory), (*actions, *surplus, *repeated, *started), step.verdict
    )


def _advance(
    id_: str, memory: Memory, seen: Observation, now: float
) -> tuple[Record, frozenset[str]]:
    """Return what has become of a slot since the last look, and the specs that have been ready."""
    record = memory.of(id_)
    if record.state in RESTING:
        if not seen.alive:
            return record, memory.proven
        # Not started by this controller: one before it did, or an operator.
        state: State = "draining" if seen.stopping else "starting"
        record = replace(record, state=state, pid=seen.pid, since=now, overdue=False)
    elif _never_started(record, seen):
        return record, memory.proven
    elif not seen.alive or (record.pid and seen.pid != record.pid):
        return _ended(id_, record, seen, memory.proven, now), memory.proven
    if not record.pid:
        record = replace(record, pid=seen.pid)
    if seen.stopping and record.state != "draining":
        return replace(record, state="draining", since=now), memory.proven
    if record.state == "starting" and seen.ready and not record.overdue:
        took = round(now - record.since, 3)
        ready = replace(record, state="ready", since=now, ready_seconds=took, proven=True, error="")
        return ready, memory.proven | {record.spec}
    if record.state == "ready" and record.crashes and now - record.since > CALM_SECONDS:
        record = replace(record, crashes=0)
    return record, memory.proven


def _never_started(record: Record, seen: Observation) -> bool:
    """Whether the start that was decided has not been carried out yet."""
    unseen = record.state == "starting" and not record.pid and not seen.alive
    return unseen and seen.started <= record.last_start


def _judge_time(
    id_: str, record: Record, seen: Observation, now: float, *, load_timeout: float, silence: float
) -> Record:
    """Mark a worker that is to be killed: not ready in time, or silent for too long."""
    if record.overdue or not seen.alive:
        return record
    if record.state == "starting" and now - record.since > load_timeout:
        answer = f": {seen.answer}" if seen.answer else ""
        error = f"{id_} was not ready within {load_timeout:g} s{answer}"
        return replace(record, overdue=True, error=error)
    if record.state == "ready" and seen.silent > silence:
        error = f"{id_} did not answer for {seen.silent:.0f} s, and was killed"
        return replace(record, overdue=True, error=error)
    return record


def _repeated(id_: str, record: Record, seen: Observation) -> list[Action]:
    """Return the action that a slot's state calls for and that is not seen to have happened."""
    if seen.alive and record.overdue:
        return [Action("kill", id_)]
    if seen.alive and record.state == "draining" and not seen.stopping:
        return [Action("drain", id_)]
    return []


def _start_again(
    current: Goal,
    candidate: Goal | None,
    memory: Memory,
    observed: Mapping[str, Observation],
    now: float,
) -> tuple[Memory, list[Action]]:
    """Repeat a start that was decided and did not happen, unless it has become pointless."""
    specs, actions = _specs(current, candidate, memory), []
    for id_, record in memory.records.items():
        if not _never_started(record, observed.get(id_, Observation())):
            continue
        if record.spec == specs.get(id_):
            actions.append(Action("start", id_))
        else:
            memory = memory.with_record(id_, replace(record, state="stopped", since=now))
    return memory, actions


def _ended(
    id_: str, record: Record, seen: Observation, proven: frozenset[str], now: float
) -> Record:
    """A worker's process is gone: drained, unable to load for good, or to be replaced."""
    gone = replace(record, pid=0, since=now, overdue=False)
    if record.state == "draining" and not record.overdue:
        return replace(gone, state="stopped", crashes=0, retry_at=now, error="")
    reason = f": {seen.exit_reason}" if seen.exit_reason else ""
    early = record.state == "starting"
    for_good = early and seen.exit_code == CANNOT_LOAD and not record.overdue
    if for_good and record.spec not in proven:
        return replace(gone, state="failed", error=f"{id_} could not load{reason}")
    crashes = record.crashes + 1
    how = _how(seen.exit_code)
    error = record.error if record.overdue else f"{id_} ended {how}{reason}"
    if early and not record.proven:
        if record.overdue:  # the next try takes as long again: this one was enough to report it
            crashes = max(crashes, MAX_EARLY_CRASHES)
        elif crashes >= MAX_EARLY_CRASHES:
            error = f"{id_} ended {crashes} times before it was ready, last {how}{reason}"
    wait = backoff(crashes, early)
    return replace(gone, state="stopped", crashes=crashes, retry_at=now + wait, error=error)


def _how(exit_code: int | None) -> str:
    if exit_code is None or exit_code < 0:
        return "by a signal"
    return f"with exit code {exit_code}"


def _drain_surplus(
    wanted: Sequence[str], memory: Memory, now: float
) -> tuple[Memory, list[Action]]:
    """Drain workers that are not wanted, but never the last one that serves."""
    keep = set(wanted)
    serving = any(memory.of(id_).state == "ready" for id_ in keep)
    actions = []
    for id_, record in memory.records.items():
        if id_ in keep or record.state not in ("starting", "ready") or record.overdue:
            continue
        if record.state == "ready" and keep and not serving:
            continue
        memory = memory.with_record(id_, replace(record, state="draining", since=now))
        actions.append(Action("drain", id_))
    return memory, actions


def _examined(current: Goal, candidate: Goal | None, memory: Memory) -> frozenset[tuple[str, str]]:
    """Return the slots that were looked at before this round as ones to start, each with the spec
    for which it was."""
    specs = _specs(current, candidate, memory)
    return frozenset(item for item in specs.items() if memory.of(item[0]).state == "stopped")


def _specs(current: Goal, candidate: Goal | None, memory: Memory) -> dict[str, str]:
    """Return what each wanted slot would be started with now."""
    return {
        id_: rollout.goal_of(id_, current, candidate, memory).target(id_).spec
        for id_ in rollout.wanted(current, candidate, memory)
    }


def _start_next(
    current: Goal,
    candidate: Goal | None,
    memory: Memory,
    observed: Mapping[str, Observation],
    now: float,
) -> tuple[Memory, list[Action]]:
    """Start one worker, if none is starting. ``observed``: the slots that are fit for it."""
    if any(record.state == "starting" for record in memory.records.values()):
        return memory, []
    # Devices whose free memory is left to a worker of the candidate that waits for more of it.
    short: set[str] = set()
    for id_ in rollout.wanted(current, candidate, memory):
        record, seen = memory.of(id_), observed.get(id_)
        if seen is None:
            continue
        goal = rollout.goal_of(id_, current, candidate, memory)
        due = record.state == "stopped" and record.retry_at <= now
        if not due or seen.alive or not seen.clear or _behind_another(goal, id_, memory):
            continue
        device = goal.target(id_).device
        if goal is not candidate and device in short:
            continue
        if seen.taken_by or seen.no_room:
            if seen.no_room and goal is candidate:
                short.add(device)
            memory = memory.with_record(id_, _waiting(id_, record, seen, now))
            continue
        target = goal.target(id_)
        spec = target.spec
        again = record.crashes > 0
        started = replace(
            record,
            state="starting",
            pid=0,
            since=now,
            last_start=seen.started,
            spec=spec,
            device=target.device,
            restarts=record.restarts + again,
            crashes=record.crashes if record.spec == spec else 0,
            proven=record.proven and record.spec == spec,
            waits_for="",
        )
        memory = memory.with_record(id_, started)
        if again:
            memory = memory.counted("crash")
        return memory, [Action("start", id_)]
    return memory, []


def _waiting(id_: str, record: Record, seen: Observation, now: float) -> Record:
    what: Literal["port", "memory"] = "port" if seen.taken_by else "memory"
    why = f"its port is taken by {seen.taken_by}" if seen.taken_by else seen.no_room
    since = record.waits_since if record.waits_for == what else now
    error = f"{id_} cannot start: {why}"
    return replace(record, waits_for=what, waits_since=since, error=error)


def _behind_another(goal: Goal, id_: str, memory: Memory) -> bool:
    """Whether a slot waits because another one with the same spec on the same device has not been
    able to load yet: it would fail alike, and each try costs a whole load."""
    target = goal.target(id_)
    if target.spec in memory.proven:
        return False
    return any(
        other.id != id_
        and (other.device, other.spec) == (target.device, target.spec)
        and memory.of(other.id).in_trouble
        and memory.of(other.id).spec == target.spec
        for other in goal.targets
    )


def _pruned(current: Goal, candidate: Goal | None, memory: Memory) -> Memory:
    """Drop what belongs to slots and specs that no plan has any more."""
    goals = [current, *([candidate] if candidate else [])]
    ids = {target.id for goal in goals for target in goal.targets}
    specs = {target.spec for goal in goals for target in goal.targets}
    records = {
        id_: record
        for id_, record in memory.records.items()
        if id_ in ids or record.state not in RESTING
    }
    specs |= {record.spec for record in records.values()}
    return replace(memory, records=records, proven=memory.proven & specs)
