"""Replace workers in turn: a plain rolling restart, or the rollout of a candidate generation.

Pure. A candidate's worker has to become ready before an old one is drained wherever a slot is free;
slots that are still pending keep the current generation, also after a crash. If the candidate
cannot load, its workers are rolled back to the current generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from launcher.controller.model import (
    BLOCKED_SECONDS,
    Action,
    Goal,
    Memory,
    Record,
    Rollout,
    Verdict,
)

ROOM_SECONDS = 3.0
"""Seconds that a candidate's worker waits for memory before an old one is drained for it."""


@dataclass(frozen=True)
class Step:
    memory: Memory
    actions: tuple[Action, ...] = ()
    verdict: Verdict = ""


def begin(memory: Memory, ids: Sequence[str]) -> Memory:
    """Add the workers of these slots to those to be replaced."""
    pending = dict(memory.rollout.pending)
    for id_ in ids:
        if pid := memory.of(id_).pid:
            pending[id_] = pid
    rollout = replace(memory.rollout, pending=tuple(pending.items()), no_extra=False, error="")
    return replace(memory, rollout=rollout)


def _outdated(goal: Goal, memory: Memory, *, unknown: bool) -> tuple[tuple[str, int], ...]:
    """Return the slots whose worker is not what the goal says, and that are not on the list yet.

    ``unknown``: also workers of which it is not known what they were started with.
    """
    listed = {*memory.rollout.moving, *(id_ for id_, _ in memory.rollout.pending)}
    return tuple(
        (id_, record.pid)
        for id_ in goal.desired_slots
        if id_ not in listed
        and (record := memory.of(id_)).alive
        and record.spec != goal.target(id_).spec
        and (record.spec or unknown)
    )


def desired_slots(current: Goal, candidate: Goal | None, memory: Memory) -> tuple[str, ...]:
    """Return every slot that should have a worker now; in a rollout, of both generations."""
    ids = [*(candidate.desired_slots if candidate else ()), *current.desired_slots]
    if memory.rollout.extra:
        ids.append(memory.rollout.extra)
    return tuple(dict.fromkeys(ids))


def goal_of(id_: str, current: Goal, candidate: Goal | None, memory: Memory) -> Goal:
    """Return the generation that a worker of this slot would start with now."""
    if candidate is None:
        return current
    pending = any(id_ == waiting for waiting, _ in memory.rollout.pending)
    its_turn = (id_ in candidate.desired_slots or id_ == memory.rollout.extra) and not pending
    return candidate if its_turn or id_ not in current.by_id else current


def step(current: Goal, candidate: Goal | None, memory: Memory, now: float) -> Step:
    """Advance a rolling restart by one step."""
    goal = candidate or current
    memory = replace(memory, rollout=_advanced(goal, candidate, memory, now))
    if error := _failure(current, candidate, memory, now):
        return _given_up(current, candidate, memory, error, now)
    if not memory.rollout.active:
        return _finished(current, candidate, memory)
    extra = memory.rollout.extra or _empty_slot(goal, memory)
    memory = replace(memory, rollout=replace(memory.rollout, extra=extra))
    return _replace_next(current, candidate, memory, now)


def _advanced(goal: Goal, candidate: Goal | None, memory: Memory, now: float) -> Rollout:
    """Drop slots that are no longer desired and those whose successor is ready; list those that
    became outdated since, or of which the list was lost."""
    pending = list(_outdated(goal, memory, unknown=candidate is not None))
    for id_, pid in memory.rollout.pending:
        record = memory.of(id_)
        if id_ not in goal.desired_slots:
            continue
        if record.state == "ready" and record.pid != pid:
            if candidate is None or record.spec == goal.target(id_).spec:
                continue
            pid = record.pid  # it crashed, and came back as it was  # noqa: PLW2901
        pending.append((id_, pid))
    moving = tuple(
        id_
        for id_ in memory.rollout.moving
        if id_ in goal.desired_slots
        and memory.of(id_).state != "ready"
        # What is known to load need not wait for room: the others are replaced meanwhile.
        and not (candidate and _is_proven(id_, goal, memory) and _blocked(id_, goal, memory, now))
    )
    extra, no_extra = memory.rollout.extra, memory.rollout.no_extra
    if extra and _waits(memory.of(extra), now):
        extra, no_extra = "", True
    return replace(
        memory.rollout, pending=tuple(pending), moving=moving, extra=extra, no_extra=no_extra
    )


def _is_proven(id_: str, goal: Goal, memory: Memory) -> bool:
    return goal.target(id_).spec in memory.proven


def _waits(record: Record, now: float) -> bool:
    """Return whether a start has waited so long that memory should be freed for it."""
    waits = record.state == "stopped" and bool(record.waits_for)
    return waits and now - record.waits_since > ROOM_SECONDS


def _blocked(id_: str, goal: Goal, memory: Memory, now: float) -> bool:
    """Return whether a start is blocked and nothing on its device has changed for as long."""
    quiet = _is_quiet(goal.target(id_).device, memory, now, BLOCKED_SECONDS)
    return quiet and memory.of(id_).blocked(now)


def _is_quiet(device: str, memory: Memory, now: float, seconds: float) -> bool:
    """Return whether no worker has started or ended on a device for ``seconds``."""
    return all(
        record.state not in ("starting", "draining") and now - record.since >= seconds
        for record in memory.records.values()
        if record.device == device
    )


def _failure(current: Goal, candidate: Goal | None, memory: Memory, now: float) -> str:
    """Return why the rollout cannot continue; empty if it can."""
    rollout = memory.rollout
    if candidate is None:
        suspects = [*(id_ for id_, _ in rollout.pending), *rollout.moving, rollout.extra]
        failed = [id_ for id_ in suspects if id_ and memory.of(id_).gave_up]
        failed += [id_ for id_ in rollout.moving if _blocked(id_, current, memory, now)]
        failed += _without_cover(current, memory, now)
    else:
        old = {id_: current.target(id_).spec for id_ in current.desired_slots}
        failed = [
            id_
            for id_ in desired_slots(current, candidate, memory)
            if goal_of(id_, current, candidate, memory) is candidate
            and (spec := candidate.target(id_).spec) != old.get(id_)
            and (
                (memory.of(id_).spec == spec and memory.of(id_).gave_up)
                or (spec not in memory.proven and _blocked(id_, candidate, memory, now))
            )
        ]
    return memory.of(failed[0]).error if failed else ""


def _without_cover(current: Goal, memory: Memory, now: float) -> list[str]:
    """Return the workers that would have to serve while the next one is replaced, if none can."""
    if memory.rollout.moving or not memory.rollout.pending:
        return []
    id_, _ = memory.rollout.pending[0]
    others = [other for other in desired_slots(current, None, memory) if other != id_]
    return others if all(_is_stuck(memory.of(other), now) for other in others) else []


def _is_stuck(record: Record, now: float) -> bool:
    return record.gave_up or record.blocked(now)


def _given_up(
    current: Goal, candidate: Goal | None, memory: Memory, error: str, now: float
) -> Step:
    """Give the rollout up: keep pending workers, and roll back those already replaced."""
    extra, reason = memory.rollout.extra, f"the restart was given up: {error}"
    if extra and memory.of(extra).state == "failed":
        memory = memory.with_record(extra, Record(since=now))
    memory = replace(memory, rollout=Rollout(error=reason))
    if candidate is None:
        return Step(memory)
    back, actions = [], []
    for id_, record in memory.records.items():
        target = current.by_id.get(id_)
        if record.waits_for:  # with another spec there may be room
            memory = memory.with_record(id_, replace(record, waits_for="", error=""))
        if record.spec in ("", target.spec if target else ""):
            continue
        if record.state == "ready":
            back.append(id_)
        elif record.state == "starting":
            drained = replace(record, state="draining", since=now, error="")
            memory = memory.with_record(id_, drained)
            actions.append(Action("drain", id_))
        elif not record.alive:
            memory = memory.with_record(id_, Record(since=now, restarts=record.restarts))
    memory = begin(memory, back)
    memory = replace(memory, rollout=replace(memory.rollout, error=reason))
    return Step(memory, tuple(actions), "given up")


def _finished(current: Goal, candidate: Goal | None, memory: Memory) -> Step:
    """Finish the rollout: a candidate that serves becomes current."""
    done = replace(memory, rollout=Rollout(error=memory.rollout.error))
    if candidate is None:
        return Step(done)
    old = {target.spec for target in current.targets}
    is_new = any(candidate.target(id_).spec not in old for id_ in candidate.desired_slots)
    serves = any(
        memory.of(id_).state == "ready" and memory.of(id_).spec == candidate.target(id_).spec
        for id_ in candidate.desired_slots
    )
    return Step(done, verdict="promoted") if serves or not is_new else Step(memory)


def _replace_next(current: Goal, candidate: Goal | None, memory: Memory, now: float) -> Step:
    """Drain the next pending worker once all others are ready."""
    rollout = memory.rollout
    ended = (entry for entry in rollout.pending if not memory.of(entry[0]).alive)
    id_, pid = next(ended, rollout.pending[0] if rollout.pending else ("", 0))
    ids = [other for other in desired_slots(current, candidate, memory) if other != id_]
    others = [memory.of(other) for other in ids]
    if room := _make_room(current, candidate, memory, now):
        return room
    if not id_ or rollout.moving:
        return Step(memory)
    record = memory.of(id_)
    if not record.alive:  # it ended by itself: its successor starts, if that is known to load
        tried = any(goal_of(other, current, candidate, memory) is candidate for other in ids)
        if candidate is not None and tried and not _is_proven(id_, candidate, memory):
            return Step(memory)
        return Step(_moving(memory, id_))
    outdated = candidate is not None or record.spec not in ("", current.target(id_).spec)
    loading_in_vain = record.state == "starting" and not record.proven and outdated
    calm = all(other.state == "ready" or _is_stuck(other, now) for other in others)
    covered = not others or any(other.state == "ready" for other in others)
    is_it = record.pid == pid and record.state in ("ready", "starting")
    if is_it and (loading_in_vain or (calm and covered)):
        return _drained(memory, id_, now)
    return Step(memory)


def _moving(memory: Memory, id_: str) -> Memory:
    pending = tuple(entry for entry in memory.rollout.pending if entry[0] != id_)
    moving = (*memory.rollout.moving, id_)
    return replace(memory, rollout=replace(memory.rollout, pending=pending, moving=moving))


def _drained(memory: Memory, id_: str, now: float) -> Step:
    memory = _moving(memory, id_)
    record = replace(memory.of(id_), state="draining", since=now)
    return Step(memory.with_record(id_, record).counted("restart"), (Action("drain", id_),))


def _short_of_room(
    current: Goal, candidate: Goal | None, memory: Memory, now: float
) -> frozenset[str]:
    """Return the devices on which a new worker waits for memory."""
    devices = set()
    for id_ in desired_slots(current, candidate, memory):
        goal = goal_of(id_, current, candidate, memory)
        new = goal is candidate or id_ in memory.rollout.moving
        if new and memory.of(id_).waits_for == "memory" and _waits(memory.of(id_), now):
            devices.add(goal.target(id_).device)
    return frozenset(device for device in devices if _is_quiet(device, memory, now, ROOM_SECONDS))


def _make_room(current: Goal, candidate: Goal | None, memory: Memory, now: float) -> Step | None:
    """Free memory for a new worker by ending one that is to be replaced anyway.

    The extra worker goes first, then one that the candidate has no slot for, then the next on the
    list. One at a time, and the last one that serves only if nothing else helps. None when memory
    is not short, or when no worker of this rollout holds any.
    """
    devices = _short_of_room(current, candidate, memory, now)
    if not devices:
        return None
    if any(record.state in ("starting", "draining") for record in memory.records.values()):
        return Step(memory)
    extra = memory.rollout.extra
    if extra and memory.of(extra).device in devices and memory.of(extra).alive:
        return Step(replace(memory, rollout=replace(memory.rollout, extra="", no_extra=True)))
    if candidate is None:
        return None
    serving = [
        id_ for id_ in desired_slots(current, candidate, memory) if memory.of(id_).state == "ready"
    ]
    there = [id_ for id_ in serving if memory.of(id_).device in devices]
    surplus = [id_ for id_ in there if id_ not in candidate.desired_slots]
    pending = [id_ for id_, _ in memory.rollout.pending if id_ in there]
    if surplus and (len(serving) > 1 or not pending):
        record = replace(memory.of(surplus[-1]), state="draining", since=now)
        return Step(memory.with_record(surplus[-1], record), (Action("drain", surplus[-1]),))
    return _drained(memory, pending[0], now) if pending else None


def _empty_slot(goal: Goal, memory: Memory) -> str:
    """Return an empty slot in which an extra worker can serve during the rollout."""
    if memory.rollout.no_extra:
        return ""
    for target in goal.targets:
        free = target.id not in goal.desired_slots and target.id not in goal.drained
        if free and memory.of(target.id).state == "stopped":
            return target.id
    return ""
