"""Decide the next actions from the desired and the observed state. Pure: no clock, no process.

It starts workers one at a time, each after the previous one is ready, restarts those that crash,
drains those that are no longer desired, and replaces all of them in a rollout without reducing
the number that serves (`rollout.py`). A decision that was not carried out is made again: decisions
are compared with what is observed, never with what was sent.
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
"""Seconds between a crash and the next start: doubled by each consecutive crash."""
CALM_SECONDS = 30.0
"""Seconds of serving after which a worker's crashes are reset."""
EARLY_BACKOFF_FACTOR = 10
"""Factor of the backoff after a crash while loading, since each retry costs a whole load."""


def backoff(crashes: int, early: bool) -> float:
    """Return the seconds to wait after the ``crashes``-th crash in a row."""
    first = FIRST_BACKOFF * (EARLY_BACKOFF_FACTOR if early else 1)
    return float(min(MAX_BACKOFF, first * 2.0 ** min(crashes - 1, 30)))


def settled(current: Goal, candidate: Goal | None, memory: Memory, now: float) -> bool:
    """Return whether the farm is stable: no rollout, nothing to drain, and every desired slot is
    ready or cannot become ready for now."""
    if candidate is not None or memory.rollout.active:
        return False
    desired_slots = set(current.desired_slots)
    if any(id_ not in desired_slots for id_, record in memory.records.items() if record.alive):
        return False
    return all(
        memory.of(id_).state == "ready"
        or memory.of(id_).gave_up
        or memory.of(id_).blocked(now)
        or (memory.of(id_).state == "stopped" and _behind_another(current, id_, memory))
        for id_ in desired_slots
    )


def decide(
    current: Goal,
    candidate: Goal | None,
    memory: Memory,
    observed: Mapping[str, Observation],
    *,
    now: float,
    load_timeout: float,
    liveness_timeout: float = float("inf"),
) -> Decision:
    """Return the next actions, what to remember, and what became of ``candidate``.

    ``observed``: every slot that supervisord has, also those without a place in a plan.
    ``liveness_timeout``: seconds without a response after which a worker counts as hanging.
    """
    actions: list[Action] = []
    examined = _examined(current, candidate, memory)
    for id_ in dict.fromkeys((*memory.records, *observed)):
        observation = observed.get(id_, Observation())
        record, proven = _advance(id_, memory, observation, now)
        record = _check_deadlines(
            id_,
            record,
            observation,
            now,
            load_timeout=load_timeout,
            liveness_timeout=liveness_timeout,
        )
        memory = replace(memory.with_record(id_, record), proven=proven)
        actions += _unfinished_actions(id_, record, observation)
    step = rollout.step(current, candidate, memory, now)
    memory, actions = step.memory, [*actions, *step.actions]
    if step.verdict == "promoted" and candidate is not None:
        current, candidate = candidate, None
    elif step.verdict == "given up":
        candidate = None
    desired_slots = rollout.desired_slots(current, candidate, memory)
    memory, surplus = _drain_surplus(desired_slots, memory, now)
    memory, repeated = _repeat_starts(current, candidate, memory, observed, now)
    # A slot that becomes free in this round is not started before the next: its port, its memory
    # and its leftovers were not observed, or for another spec.
    specs = _specs(current, candidate, memory)
    fit = {
        id_: observation
        for id_, observation in observed.items()
        if (id_, specs.get(id_)) in examined
    }
    memory, started = _start_next(current, candidate, memory, fit, now)
    return Decision(
        _pruned(current, candidate, memory), (*actions, *surplus, *repeated, *started), step.verdict
    )


def _advance(
    id_: str, memory: Memory, observation: Observation, now: float
) -> tuple[Record, frozenset[str]]:
    """Return a slot's new record, and the specs that have been ready."""
    record = memory.of(id_)
    if record.state in RESTING:
        if not observation.alive:
            return record, memory.proven
        # Not started by this controller: one before it did, or an operator.
        state: State = "draining" if observation.stopping else "starting"
        record = replace(record, state=state, pid=observation.pid, since=now, overdue=False)
    elif _never_started(record, observation):
        return record, memory.proven
    elif not observation.alive or (record.pid and observation.pid != record.pid):
        return _after_exit(id_, record, observation, memory.proven, now), memory.proven
    if not record.pid:
        record = replace(record, pid=observation.pid)
    if observation.stopping and record.state != "draining":
        return replace(record, state="draining", since=now), memory.proven
    if record.state == "starting" and observation.ready and not record.overdue:
        took = round(now - record.since, 3)
        ready = replace(record, state="ready", since=now, ready_seconds=took, proven=True, error="")
        return ready, memory.proven | {record.spec}
    if record.state == "ready" and record.crashes and now - record.since > CALM_SECONDS:
        record = replace(record, crashes=0)
    return record, memory.proven


def _never_started(record: Record, observation: Observation) -> bool:
    """Whether the start that was decided has not been carried out yet."""
    not_observed = record.state == "starting" and not record.pid and not observation.alive
    return not_observed and observation.started <= record.last_start


def _check_deadlines(
    id_: str,
    record: Record,
    observation: Observation,
    now: float,
    *,
    load_timeout: float,
    liveness_timeout: float,
) -> Record:
    """Mark a worker to be killed: not ready in time, or without a response for too long."""
    if record.overdue or not observation.alive:
        return record
    if record.state == "starting" and now - record.since > load_timeout:
        answer = f": {observation.answer}" if observation.answer else ""
        error = f"{id_} was not ready within {load_timeout:g} s{answer}"
        return replace(record, overdue=True, error=error)
    if record.state == "ready" and observation.unresponsive > liveness_timeout:
        error = f"{id_} did not answer for {observation.unresponsive:.0f} s, and was killed"
        return replace(record, overdue=True, error=error)
    return record


def _unfinished_actions(id_: str, record: Record, observation: Observation) -> list[Action]:
    """Return the action that a slot's state requires and whose effect is not observed yet."""
    if observation.alive and record.overdue:
        return [Action("kill", id_)]
    if observation.alive and record.state == "draining" and not observation.stopping:
        return [Action("drain", id_)]
    return []


def _repeat_starts(
    current: Goal,
    candidate: Goal | None,
    memory: Memory,
    observed: Mapping[str, Observation],
    now: float,
) -> tuple[Memory, list[Action]]:
    """Repeat a start that did not happen, unless the slot's spec has changed."""
    specs, actions = _specs(current, candidate, memory), []
    for id_, record in memory.records.items():
        if not _never_started(record, observed.get(id_, Observation())):
            continue
        if record.spec == specs.get(id_):
            actions.append(Action("start", id_))
        else:
            memory = memory.with_record(id_, replace(record, state="stopped", since=now))
    return memory, actions


def _after_exit(
    id_: str, record: Record, observation: Observation, proven: frozenset[str], now: float
) -> Record:
    """Return the record after the process has ended: drained, failed, or to be restarted."""
    gone = replace(record, pid=0, since=now, overdue=False)
    if record.state == "draining" and not record.overdue:
        return replace(gone, state="stopped", crashes=0, retry_at=now, error="")
    reason = f": {observation.exit_reason}" if observation.exit_reason else ""
    early = record.state == "starting"
    for_good = early and observation.exit_code == CANNOT_LOAD and not record.overdue
    if for_good and record.spec not in proven:
        return replace(gone, state="failed", error=f"{id_} could not load{reason}")
    crashes = record.crashes + 1
    how = _exit_description(observation.exit_code)
    error = record.error if record.overdue else f"{id_} ended {how}{reason}"
    if early and not record.proven:
        if record.overdue:  # the next try takes as long again: this one was enough to report it
            crashes = max(crashes, MAX_EARLY_CRASHES)
        elif crashes >= MAX_EARLY_CRASHES:
            error = f"{id_} ended {crashes} times before it was ready, last {how}{reason}"
    wait = backoff(crashes, early)
    return replace(gone, state="stopped", crashes=crashes, retry_at=now + wait, error=error)


def _exit_description(exit_code: int | None) -> str:
    if exit_code is None or exit_code < 0:
        return "by a signal"
    return f"with exit code {exit_code}"


def _drain_surplus(
    desired_slots: Sequence[str], memory: Memory, now: float
) -> tuple[Memory, list[Action]]:
    """Drain workers that are not desired, but never the last one that serves."""
    keep = set(desired_slots)
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
    """Return (slot, spec) of the slots that were observed as candidates for a start."""
    specs = _specs(current, candidate, memory)
    return frozenset(item for item in specs.items() if memory.of(item[0]).state == "stopped")


def _specs(current: Goal, candidate: Goal | None, memory: Memory) -> dict[str, str]:
    """Return the spec that each desired slot would start with now."""
    return {
        id_: rollout.goal_of(id_, current, candidate, memory).target(id_).spec
        for id_ in rollout.desired_slots(current, candidate, memory)
    }


def _start_next(
    current: Goal,
    candidate: Goal | None,
    memory: Memory,
    observed: Mapping[str, Observation],
    now: float,
) -> tuple[Memory, list[Action]]:
    """Start one worker, if none is starting. ``observed``: the slots that may start."""
    if any(record.state == "starting" for record in memory.records.values()):
        return memory, []
    # Devices whose free memory is left to a worker of the candidate that waits for more of it.
    short: set[str] = set()
    for id_ in rollout.desired_slots(current, candidate, memory):
        record, observation = memory.of(id_), observed.get(id_)
        if observation is None:
            continue
        goal = rollout.goal_of(id_, current, candidate, memory)
        due = record.state == "stopped" and record.retry_at <= now
        if (
            not due
            or observation.alive
            or not observation.clear
            or _behind_another(goal, id_, memory)
        ):
            continue
        device = goal.target(id_).device
        if goal is not candidate and device in short:
            continue
        if observation.taken_by or observation.no_room:
            if observation.no_room and goal is candidate:
                short.add(device)
            memory = memory.with_record(id_, _waiting(id_, record, observation, now))
            continue
        target = goal.target(id_)
        spec = target.spec
        again = record.crashes > 0
        started = replace(
            record,
            state="starting",
            pid=0,
            since=now,
            last_start=observation.started,
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


def _waiting(id_: str, record: Record, observation: Observation, now: float) -> Record:
    what: Literal["port", "memory"] = "port" if observation.taken_by else "memory"
    why = (
        f"its port is taken by {observation.taken_by}"
        if observation.taken_by
        else observation.no_room
    )
    since = record.waits_since if record.waits_for == what else now
    error = f"{id_} cannot start: {why}"
    return replace(record, waits_for=what, waits_since=since, error=error)


def _behind_another(goal: Goal, id_: str, memory: Memory) -> bool:
    """Return whether a slot waits for another with the same spec and device that failed to load: it
    would fail too, and each try costs a whole load."""
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
    """Drop records and specs that are in no plan any more."""
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
