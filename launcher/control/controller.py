"""The controller: what is wanted, what is seen, and the next step, again and again.

It may die at any time: requests do not pass through it, and what it remembers lies in a file.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from launcher.configuration.sources import ConfigError
from launcher.configuration.state import StateError
from launcher.control.observe import Observer
from launcher.control.reconcile import (
    Action,
    Desired,
    Memory,
    Place,
    Roll,
    Seen,
    decide,
    settled,
    wanted,
)
from launcher.control.store import Store
from launcher.processes import farm as farms
from launcher.processes.farm import Farm
from launcher.processes.rotate import rotate_balancer_logs
from launcher.processes.supervisor import GRACE_AFTER_REQUEST, Supervisor, SupervisorError

T = TypeVar("T")
log = logging.getLogger("controller")

BUSY_INTERVAL = 0.2
CALM_INTERVAL = 1.0
"""Seconds between two looks, while something is under way and otherwise."""
BUSY_AFTER_EVENT = 3.0
ROTATE_INTERVAL = 15.0
LISTEN_INTERVAL = 5.0
"""Seconds between two questions to every ready worker whether it still answers."""


class RefusedError(Exception):
    """What was asked for cannot be done; ``status`` is the HTTP status that says so."""

    def __init__(self, message: str, status: int = 409) -> None:
        super().__init__(message)
        self.status = status


class Controller:
    """Holds one farm to what is wanted of it. Building one does nothing; ``run`` does."""

    def __init__(self, farm: Farm, supervisor: Supervisor) -> None:
        self.farm = farm
        self.store = Store(farm.state)
        self.desired, self.memory = self.store.read(farm)
        self.seen: dict[str, Seen] = {}
        self.problem = ""
        """Why nothing can be done at the moment; empty when all is well."""
        self._supervisor = supervisor
        self._observer = Observer(farm, supervisor)
        self._wake = asyncio.Event()
        self._busy_until = 0.0
        self._watched: dict[int, int] = {}
        """pid → pidfd"""
        self._listened = 0.0
        self._silent_since: dict[int, float] = {}
        """pid → when it was first asked in vain (monotonic seconds)"""
        self._lock = asyncio.Lock()
        """Held around supervisord's connection and around every change of mind."""
        self._stored: tuple[Desired, Memory] | None = None

    @property
    def places(self) -> list[Place]:
        return [Place(slot.id, slot.device_id) for slot in self.farm.plan.slots]

    @property
    def wanted(self) -> tuple[str, ...]:
        return wanted(self.places, self.desired)

    @property
    def settled(self) -> bool:
        return bool(self.seen) and settled(self.places, self.desired, self.memory)

    def ready(self) -> list[str]:
        return [id_ for id_, record in self.memory.records.items() if record.state == "ready"]

    async def run(self) -> None:
        """Work until cancelled."""
        rotated = time.monotonic()
        while True:
            self._wake.clear()
            await self._guarded(self.step)
            if time.monotonic() - rotated > ROTATE_INTERVAL:
                rotated = time.monotonic()
                await self._guarded(lambda: asyncio.to_thread(rotate_balancer_logs, self.farm))
            busy = not self.settled or time.monotonic() < self._busy_until
            with suppress(TimeoutError):
                async with asyncio.timeout(BUSY_INTERVAL if busy else CALM_INTERVAL):
                    await self._wake.wait()

    async def _guarded(self, work: Callable[[], Awaitable[None]]) -> None:
        """Nothing that goes wrong in one round may end the controller."""
        try:
            await work()
            self._tell("")
        except (SupervisorError, StateError, ConfigError) as error:
            self._tell(str(error))
        except Exception as error:
            log.exception("a round failed")
            self._tell(f"{type(error).__name__}: {error}")

    def _tell(self, problem: str) -> None:
        if problem and problem != self.problem:
            log.warning("%s", problem)
        self.problem = problem

    async def step(self) -> None:
        """Look, decide, act, remember."""
        async with self._lock:
            ids = {*self.wanted, self.memory.roll.extra}
            seen = await asyncio.to_thread(self._observer.look, self.memory, ids)
            self.seen = {
                id_: await self._observer.asked(id_, sight)
                if self._may_become_ready(id_, sight)
                else sight
                for id_, sight in seen.items()
            }
            await self._listen()
            before = self.memory
            decision = decide(
                self.places,
                self.desired,
                self.memory,
                self.seen,
                now=time.monotonic(),
                load_timeout=self.farm.settings.workers.load_timeout,
                silence=self.farm.settings.workers.request_timeout + GRACE_AFTER_REQUEST,
                spec=self.farm.digest,
            )
            self.memory = decision.memory
            self._log_changes(before)
            # Remembered before it is done: a controller that dies in between finds the process.
            # What cannot be remembered is done all the same: a full disk must stop no replacement.
            unwritten = None
            try:
                await self._remember()
            except (StateError, ConfigError) as error:
                unwritten = error
            for action in decision.actions:
                await asyncio.to_thread(self._act, action)
            self._watch()
            if unwritten is not None:
                raise unwritten

    async def _listen(self) -> None:
        """Ask the ready workers whether they answer at all. Ours do so whatever the model does,
        and are never silent for longer than a request may take; a server of the user's may be."""
        ready = {} if self.farm.foreign else {i: self.seen[i].pid for i in self.ready()}
        if time.monotonic() - self._listened > LISTEN_INTERVAL:
            self._listened = time.monotonic()
            answers = await asyncio.gather(*map(self._observer.answers, ready))
            self._silent_since = {
                pid: self._silent_since.get(pid, self._listened)
                for pid, answered in zip(ready.values(), answers, strict=True)
                if not answered
            }
        for id_, pid in ready.items():
            if (since := self._silent_since.get(pid)) is not None:
                silent = self._listened - since
                self.seen[id_] = replace(self.seen[id_], silent=silent)

    def _may_become_ready(self, id_: str, sight: Seen) -> bool:
        return sight.alive and not sight.stopping and self.memory.of(id_).state != "ready"

    def _act(self, action: Action) -> None:
        log.info("%s %s", action.do, action.id)
        do = {
            "start": self._supervisor.start,
            "drain": self._supervisor.stop,
            "kill": self._supervisor.kill,
        }[action.do]
        try:
            do(action.id)
        except SupervisorError as error:
            log.warning("%s %s: %s", action.do, action.id, error)

    def _log_changes(self, before: Memory) -> None:
        for id_, record in self.memory.records.items():
            if record.state != before.of(id_).state:
                suffix = f": {record.error}" if record.error else ""
                log.info("%s is %s%s", id_, record.state, suffix)

    async def _remember(self) -> None:
        now = (self.desired, self.memory)
        if now != self._stored:
            await asyncio.to_thread(self.store.write, *now)
            self._stored = now

    def _watch(self) -> None:
        """Wake up at the moment in which a worker ends, rather than at the next look."""
        pids = {sight.pid for sight in self.seen.values() if sight.alive}
        loop = asyncio.get_running_loop()
        for pid in pids - set(self._watched):
            with suppress(OSError):
                fd = os.pidfd_open(pid)
                self._watched[pid] = fd
                loop.add_reader(fd, self._ended, pid)
        for pid in set(self._watched) - pids:
            self._forget(pid)

    def _ended(self, pid: int) -> None:
        self._forget(pid)
        self.stir()

    def _forget(self, pid: int) -> None:
        fd = self._watched.pop(pid, None)
        if fd is not None:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)

    def stir(self) -> None:
        """Look again now, and often for a while."""
        self._busy_until = time.monotonic() + BUSY_AFTER_EVENT
        self._wake.set()

    async def scale(self, count: int) -> tuple[str, ...]:
        """Want ``count`` workers. Returns warnings; raises RefusedError with the numbers."""
        if refusal := self.farm.plan.refusal_for(count):
            raise RefusedError(refusal)
        usable = self.farm.plan.capacity - len(self.desired.drained)
        if count > usable:
            names = ", ".join(sorted(self.desired.drained))
            raise RefusedError(
                f"{count} workers do not fit: {usable} of {self.farm.plan.capacity} slots may be "
                f"used, {names} drained; refill with `gpufarm restart {names.split(', ')[0]}`"
            )
        async with self._lock:
            self._forgive(tuple(place.id for place in self.places))
            await self._want(replace(self.desired, count=count))
        return self.farm.plan.warnings_for(count)

    async def drain(self, id_: str) -> None:
        """Empty a slot and keep it empty."""
        self._check(id_)
        async with self._lock:
            if id_ in self.desired.drained:
                return
            if id_ not in self.wanted:
                raise RefusedError(f"{id_} has no worker to drain; there is: {self._named()}")
            self._forgive((id_,))
            await self._want(Desired(self.desired.count - 1, self.desired.drained | {id_}))

    async def restart(self, ids: tuple[str, ...] = ()) -> None:
        """Replace workers in turn, all of them where none is named; refill drained slots."""
        for id_ in ids:
            self._check(id_)
            if id_ not in (*self.wanted, *self.desired.drained):
                raise RefusedError(
                    f"{id_} has no worker to restart; there is: {self._named()}. `gpufarm scale` "
                    f"adds workers"
                )
        async with self._lock:
            refilled = self.desired.drained & set(ids)
            count = min(self.desired.count + len(refilled), self.farm.plan.capacity)
            desired = Desired(count, self.desired.drained - refilled)
            chosen = ids or wanted(self.places, desired)
            self._forgive(chosen)
            self._roll(chosen)
            await self._want(desired)

    async def reload(self) -> None:
        """Take over what `up` has written: another plan, another configuration."""
        fresh = await asyncio.to_thread(farms.load, self.farm.state)
        if fresh is None:
            raise RefusedError("there is no farm on disk; run `gpufarm up`")
        async with self._lock:
            self.farm = self._observer.farm = fresh
            ids = {slot.id for slot in fresh.plan.slots}
            desired = Desired(
                min(self.desired.count, len(ids)), self.desired.drained & frozenset(ids)
            )
            self._forgive(tuple(ids))
            old = [
                id_
                for id_ in wanted(self.places, desired)
                if self.memory.of(id_).spec not in ("", fresh.digest)
            ]
            self._roll(tuple(old))
            await self._want(desired)

    def _named(self) -> str:
        return ", ".join(self.wanted) or "none"

    def _check(self, id_: str) -> None:
        ids = [place.id for place in self.places]
        if id_ not in ids:
            raise RefusedError(f"there is no worker {id_}; there is: {', '.join(ids)}", status=404)

    def _forgive(self, ids: tuple[str, ...]) -> None:
        """Somebody asked again, so what was given up is tried again."""
        self.memory = replace(self.memory, roll=replace(self.memory.roll, error=""))
        for id_ in ids:
            record = self.memory.of(id_)
            if record.state == "failed":
                fresh = replace(record, state="stopped", crashes=0, retry_at=0.0, error="")
                self.memory = self.memory.with_record(id_, fresh)

    def _roll(self, ids: tuple[str, ...]) -> None:
        pending = dict(self.memory.roll.pending)
        for id_ in ids:
            if pid := self.memory.of(id_).pid:
                pending[id_] = pid
        roll = Roll(tuple(pending.items()), self.memory.roll.extra)
        self.memory = replace(self.memory, roll=roll)

    async def _want(self, desired: Desired) -> None:
        """Raises RefusedError where it cannot be written down: then it is not wanted either."""
        before, self.desired = self.desired, desired
        try:
            await self._remember()
        except (StateError, ConfigError) as error:
            self.desired = before
            raise RefusedError(str(error), status=507) from None
        self.stir()
