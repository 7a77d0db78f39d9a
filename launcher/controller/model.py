"""The data of a decision: desired state, observed state, and what is remembered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

State = Literal["stopped", "starting", "ready", "draining", "failed"]
Verdict = Literal["", "promoted", "given up"]

RESTING = ("stopped", "failed")
MAX_EARLY_CRASHES = 3
"""Crashes before it was ever ready after which a worker is reported; it is still retried."""
BLOCKED_SECONDS = 30.0
"""Seconds of waiting for memory or a port after which a start is reported; it still waits."""


@dataclass(frozen=True)
class Desired:
    """The state that the user set beyond the configuration; it lasts until `down`."""

    count: int | None = None
    """Slots to use, as `gpufarm scale` set it; None: as the configuration says."""
    drained: frozenset[str] = frozenset()
    """Slots that stay empty although they could be used. Each takes one off the count."""


@dataclass(frozen=True)
class Target:
    """What one slot should run."""

    id: str
    device: str
    spec: str
    """Digest of everything that starts its worker, except its port."""


@dataclass(frozen=True)
class Goal:
    """The desired state of the farm under one generation of the configuration."""

    targets: tuple[Target, ...]
    """Every slot of the plan, in order."""
    count: int
    """How many of them should have a worker."""
    drained: frozenset[str] = frozenset()

    @cached_property
    def desired_slots(self) -> tuple[str, ...]:
        """The slots that should have a worker: the first ``count`` that are not drained."""
        usable = [target.id for target in self.targets if target.id not in self.drained]
        return tuple(usable[: max(0, self.count)])

    @cached_property
    def by_id(self) -> Mapping[str, Target]:
        return {target.id: target for target in self.targets}

    def target(self, id_: str) -> Target:
        return self.by_id[id_]

    @classmethod
    def of(cls, targets: tuple[Target, ...], planned: int, desired: Desired) -> Goal:
        """Build it. ``planned``: the plan's count, used when the user has set none."""
        drained = desired.drained & {target.id for target in targets}
        count = planned if desired.count is None else min(desired.count, len(targets))
        return cls(targets, count - len(drained), drained)


@dataclass(frozen=True)
class Observation:
    """One slot as it is observed now."""

    alive: bool = False
    stopping: bool = False
    """It has been sent its stop signal and has not ended yet."""
    pid: int = 0
    started: float = 0.0
    """When supervisord last started it (Unix seconds); 0 when it never did."""
    exit_code: int | None = None
    """Of its last process; negative when a signal ended it."""
    ready: bool = False
    """It has responded. Ignored once it was ready: a busy server may not serve its health path."""
    answer: str = ""
    """Its last response to the readiness probe."""
    clear: bool = True
    """Nothing is left of its last process: no child, no device memory."""
    taken_by: str = ""
    """The process that listens on its port and is not its worker."""
    no_room: str = ""
    """Why its device has no memory for one more worker now, with the numbers."""
    unresponsive: float = 0.0
    """Seconds for which it has not responded at all; not for external servers."""
    exit_reason: str = ""
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
    """It has been ready with this spec."""
    ready_seconds: float | None = None
    """How long its last start took until it was ready."""
    error: str = ""
    spec: str = ""
    """What it was started with."""
    device: str = ""
    """Where it was started."""
    overdue: bool = False
    """It is to be killed: it was not ready in time, or no longer responds."""
    last_start: float = 0.0
    """supervisord's last start of it before the one that was decided (Unix seconds)."""
    waits_for: Literal["", "port", "memory"] = ""
    """What its start is waiting for."""
    waits_since: float = 0.0
    """Since when (monotonic seconds)."""

    @property
    def alive(self) -> bool:
        return self.state not in RESTING

    @property
    def in_trouble(self) -> bool:
        """It has failed, or crashed before it was ever ready with this spec."""
        return self.state == "failed" or (self.crashes > 0 and not self.proven)

    @property
    def gave_up(self) -> bool:
        """It has failed for good, or so often that it is reported; the latter is retried."""
        early = self.crashes >= MAX_EARLY_CRASHES and not self.proven
        return self.state == "failed" or (early and self.state != "ready")

    def blocked(self, now: float) -> bool:
        """Its start has waited for so long that this is reported."""
        return bool(self.waits_for) and now - self.waits_since >= BLOCKED_SECONDS


@dataclass(frozen=True)
class Rollout:
    """A rolling restart that is under way."""

    pending: tuple[tuple[str, int], ...] = ()
    """Slots whose worker with this pid is still to be replaced, in order."""
    moving: tuple[str, ...] = ()
    """Slots whose worker has been drained and whose successor is not ready yet: one, and more only
    where memory is short."""
    extra: str = ""
    """The otherwise empty slot that serves meanwhile."""
    no_extra: bool = False
    """There was no memory for an extra one."""
    error: str = ""
    """Why the last one was given up."""

    @property
    def active(self) -> bool:
        return bool(self.pending or self.moving)


@dataclass(frozen=True)
class Memory:
    """Everything that is carried from one decision to the next."""

    records: Mapping[str, Record] = field(default_factory=dict)
    rollout: Rollout = field(default_factory=Rollout)
    proven: frozenset[str] = frozenset()
    """Specs of which a worker has been ready: what they need to load is there in principle."""
    replaced: Mapping[str, int] = field(default_factory=dict)
    """How many workers were started again, by reason: crash, restart."""

    def of(self, id_: str) -> Record:
        return self.records.get(id_, Record())

    def with_record(self, id_: str, record: Record) -> Memory:
        return replace(self, records={**self.records, id_: record})

    def counted(self, reason: str) -> Memory:
        return replace(self, replaced={**self.replaced, reason: self.replaced.get(reason, 0) + 1})

    def reset(self, ids: tuple[str, ...]) -> Memory:
        """Clear the errors and waits of these slots, for a new attempt by the user."""
        memory = replace(self, rollout=replace(self.rollout, error=""))
        for id_ in ids:
            record = memory.of(id_)
            if record.in_trouble or record.waits_for:
                state: State = "stopped" if record.state == "failed" else record.state
                fresh = replace(
                    record, state=state, crashes=0, retry_at=0.0, waits_for="", error=""
                )
                memory = memory.with_record(id_, fresh)
        return memory


@dataclass(frozen=True)
class Action:
    """``start``, ``drain`` (SIGTERM, and time to finish) or ``kill``."""

    do: Literal["start", "drain", "kill"]
    id: str


@dataclass(frozen=True)
class Decision:
    memory: Memory
    actions: tuple[Action, ...] = ()
    verdict: Verdict = ""
    """What became of the candidate in this round."""
