"""Replace workers in turn: a plain rolling restart, or the rollout of a candidate generation.

Pure. A candidate's worker has to become ready before an old one is drained wherever a slot is free;
slots whose turn has not come go on with the current generation, also when they crash. When the
candidate cannot load, its workers are replaced by those of the current generation again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from launcher.control.desired import Action, Goal, Memory, Record, Rollout, Verdict

ROOM_SECONDS = 3.0
"""How long a candidate's worker waits for memory before an old one makes room for it."""


@dataclass(frozen=True)
class Step:
    memory: Memory
    actions: tuple[Action, ...] = ()
    verdict: Verdict = ""


def begin(memory: Memory, ids: Sequence[str]) -> Memory:
    """Put the workers of these slots on the list of those to be replaced."""
    pending = dict(memory.rollout.pending)
    for id_ in ids:
        if pid := memory.of(id_).pid:
            pending[id_] = pid
    rollout = replace(memory.rollout, pending=tuple(pending.items()), no_extra=False, error="")
    return replace(memory, rollout=rollout)


def begin_candidate(memory: Memory, candidate: Goal) -> Memory:
    """Put every worker that is not what the candidate says on the list; forget an older rollout."""
    outdated = [
        id_
        for id_ in candidate.wanted
        if memory.of(id_).alive and memory.of(id_).spec != candidate.target(id_).spec
    ]
    return begin(replace(memory, rollout=Rollout()), outdated)


def wanted(current: Goal, candidate: Goal | None, memory: Memory) -> tuple[str, ...]:
    """Every slot that is to have a worker now: until a candidate is current, those of both."""
    ids = [*(candidate.wanted if candidate else ()), *current.wanted]
    if memory.rollout.extra:
        ids.append(memory.rollout.extra)
    return tuple(dict.fromkeys(ids))


def goal_of(id_: str, current: Goal, candidate: Goal | None, memory: Memory) -> Goal:
    """Return the generation with which a worker of this slot would be started now."""
    if candidate is None:
        return current
    pending = any(id_ == waiting for waiting, _ in memory.rollout.pending)
    its_turn = (id_ in candidate.wanted or id_ == memory.rollout.extra) and not pending
    return candidate if its_turn or id_ not in current.by_id else current


def step(current: Goal, candidate: Goal | None, memory: Memory, now: float) -> Step:
    """Carry a rolling restart one step further."""
    goal = candidate or current
    memory = replace(memory, rollout=_advanced(goal, candidate, memory))
    if error := _failure(current, candidate, memory):
        return _given_up(current, candidate, memory, error, now)
    if not memory.rollout.active:
        return _finished(current, candidate, memory)
    extra = memory.rollout.extra or _empty_slot(goal, memory)
    memory = replace(memory, rollout=replace(memory.rollout, extra=extra))
    return _replace_next(current, candidate, memory, now)


def _advanced(goal: Goal, candidate: Goal | None, memory: Memory) -> Rollout:
    """Drop slots that are no longer wanted and those whose successor is ready."""
    pending = []
    for id_, pid in memory.rollout.pending:
        record = memory.of(id_)
        if id_ not in goal.wanted:
            continue
        if record.state == "ready" and record.pid != pid:
            if candidate is None or record.spec == goal.target(id_).spec:
                continue
            pid = record.pid  # it crashed, and came back as it was  # noqa: PLW2901
        pending.append((id_, pid))
    moving = tuple(
        id_
        for id_ in memory.rollout.moving
        if id_ in goal.wanted and memory.of(id_).state != "ready"
    )
    return replace(memory.rollout, pending=tuple(pending), moving=moving)


def _failure(current: Goal, candidate: Goal | None, memory: Memory) -> str:
    """Why the rollout cannot go on; empty while it can."""
    rollout = memory.rollout
    if candidate is None:
        suspects = [*(id_ for id_, _ in rollout.pending), *rollout.moving, rollout.extra]
    else:
        old = {target.spec for target in current.targets}
        suspects = [
            target.id
            for target in candidate.targets
            if target.spec not in old and memory.of(target.id).spec == target.spec
        ]
    failed = [id_ for id_ in suspects if id_ and memory.of(id_).gave_up]
    return memory.of(failed[0]).error if failed else ""


def _given_up(
    current: Goal, candidate: Goal | None, memory: Memory, error: str, now: float
) -> Step:
    """What the new one cannot do, the others would not do either: leave them as they are, and
    bring back what has been replaced already."""
    extra, reason = memory.rollout.extra, f"the restart was given up: {error}"
    if extra and memory.of(extra).state == "failed":
        memory = memory.with_record(extra, Record(since=now))
    memory = replace(memory, rollout=Rollout(error=reason))
    if candidate is None:
        return Step(memory)
    back, actions = [], []
    for id_, record in memory.records.items():
        target = current.by_id.get(id_)
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
    """Nothing is left to be replaced: a candidate that serves becomes current."""
    done = replace(memory, rollout=Rollout(error=memory.rollout.error))
    if candidate is None:
        return Step(done)
    old = {target.spec for target in current.targets}
    is_new = any(candidate.target(id_).spec not in old for id_ in candidate.wanted)
    serves = any(
        memory.of(id_).state == "ready" and memory.of(id_).spec == candidate.target(id_).spec
        for id_ in candidate.wanted
    )
    return Step(done, verdict="promoted") if serves or not is_new else Step(memory)


def _replace_next(current: Goal, candidate: Goal | None, memory: Memory, now: float) -> Step:
    """Drain the next worker on the list once everything else is ready."""
    rollout = memory.rollout
    id_, pid = rollout.pending[0] if rollout.pending else ("", 0)
    ids = [other for other in wanted(current, candidate, memory) if other != id_]
    others = [memory.of(other) for other in ids]
    if _waits_for_room(others, now):
        return _make_room(current, candidate, memory, now)
    if not id_ or rollout.moving:
        return Step(memory)
    record = memory.of(id_)
    if not record.alive:
        return Step(_moving(memory, id_))  # it ended by itself: its successor starts
    if record.pid != pid or record.state not in ("ready", "starting"):
        return Step(memory)
    loading_in_vain = record.state == "starting" and not record.proven and candidate is not None
    calm = all(other.state == "ready" or other.gave_up for other in others)
    covered = not others or any(other.state == "ready" for other in others)
    if not (loading_in_vain or (calm and covered)):
        return Step(memory)
    return _drained(memory, id_, now)


def _moving(memory: Memory, id_: str) -> Memory:
    pending = tuple(entry for entry in memory.rollout.pending if entry[0] != id_)
    moving = (*memory.rollout.moving, id_)
    return replace(memory, rollout=replace(memory.rollout, pending=pending, moving=moving))


def _drained(memory: Memory, id_: str, now: float) -> Step:
    memory = _moving(memory, id_)
    record = replace(memory.of(id_), state="draining", since=now)
    return Step(memory.with_record(id_, record).counted("restart"), (Action("drain", id_),))


def _waits_for_room(records: Sequence[Record], now: float) -> bool:
    return any(
        record.state == "stopped"
        and record.waits_for == "memory"
        and now - record.waits_since > ROOM_SECONDS
        for record in records
    )


def _make_room(current: Goal, candidate: Goal | None, memory: Memory, now: float) -> Step:
    """Memory is short for one more beside the old ones: end one that is to go anyway.

    The extra slot is given up first, then a worker goes that the candidate has no slot for, then
    the next on the list. One at a time, and the last one that serves only where no other way is
    left.
    """
    if any(record.state == "draining" for record in memory.records.values()):
        return Step(memory)
    extra = memory.rollout.extra
    if extra and memory.of(extra).waits_for:
        memory = memory.with_record(extra, replace(memory.of(extra), waits_for="", error=""))
        return Step(replace(memory, rollout=replace(memory.rollout, extra="", no_extra=True)))
    goal = candidate or current
    serving = [id_ for id_ in wanted(current, candidate, memory) if memory.of(id_).state == "ready"]
    surplus = [id_ for id_ in serving if id_ not in goal.wanted and id_ != extra]
    if surplus and len(serving) > 1:
        record = replace(memory.of(surplus[-1]), state="draining", since=now)
        return Step(memory.with_record(surplus[-1], record), (Action("drain", surplus[-1]),))
    if not memory.rollout.pending:
        return Step(memory)
    return _drained(memory, memory.rollout.pending[0][0], now)


def _empty_slot(goal: Goal, memory: Memory) -> str:
    """An otherwise empty slot, in which one more may serve meanwhile."""
    if memory.rollout.no_extra:
        return ""
    for target in goal.targets:
        free = target.id not in goal.wanted and target.id not in goal.drained
        if free and memory.of(target.id).state == "stopped":
            return target.id
    return ""
