"""The controller: compare what is desired with what is observed, and act, again and again.

It may die at any time: requests do not pass through it, and what it remembers lies in files.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

from launcher.config.sources import ConfigError
from launcher.config.state import StateError
from launcher.controller import logs, rollout
from launcher.controller.model import Action, Desired, Goal, Memory, Observation, Target
from launcher.controller.observe import Observer, Start, refusal_for
from launcher.controller.reconcile import decide, settled
from launcher.controller.store import Store
from launcher.planning import reservations
from launcher.planning.held import of_starts
from launcher.supervision import farm as farms
from launcher.supervision.deleted_logs import reopen_missing_logs
from launcher.supervision.farm import Farm, Generation
from launcher.supervision.log_rotation import rotate_balancer_logs
from launcher.supervision.supervisord import GRACE_AFTER_REQUEST, Supervisor, SupervisorError

log = logging.getLogger("controller")

BUSY_INTERVAL = 0.2
CALM_INTERVAL = 1.0
"""Seconds between two looks, while something is under way and otherwise."""
BUSY_AFTER_EVENT = 3.0
ROTATE_INTERVAL = 15.0
LIVENESS_INTERVAL = 5.0
"""Seconds between two questions to every ready worker whether it still answers."""


class RefusedError(Exception):
    """What was asked for cannot be done; ``status`` is the HTTP status that says so."""

    def __init__(self, message: str, status: int = 409) -> None:
        super().__init__(message)
        self.status = status


class Controller:
    """Holds one farm to its desired state. Building one does nothing; ``run`` does."""

    def __init__(self, farm: Farm, supervisor: Supervisor) -> None:
        self.farm = farm
        self.store = Store(farm.state)
        self.desired, self.memory = self.store.read()
        self.observed: dict[str, Observation] = {}
        self.problem = ""
        """Why nothing can be done at the moment; empty when all is well."""
        self._supervisor = supervisor
        self._observer = Observer(farm, supervisor)
        self._wake = asyncio.Event()
        self._busy_until = 0.0
        self._pidfds: dict[int, int] = {}
        """pid → pidfd"""
        self._liveness_probed = 0.0
        self._unresponsive_since: dict[int, float] = {}
        """pid → when it was first asked in vain (monotonic seconds)"""
        self._lock = asyncio.Lock()
        """Held around supervisord's connection and around every change of the desired state."""
        self._stored: tuple[Desired, Memory] | None = None
        self._reserved: dict[str, int] | None = None

    @property
    def current(self) -> Goal:
        return self._goal(self.farm.current)

    @property
    def candidate(self) -> Goal | None:
        return self._goal(self.farm.candidate) if self.farm.candidate else None

    def _goal(self, generation: Generation) -> Goal:
        slots = generation.plan.slots
        targets = tuple(Target(s.id, s.device_id, generation.spec_of(s)) for s in slots)
        return Goal.of(targets, generation.plan.count, self.desired)

    @property
    def desired_slots(self) -> tuple[str, ...]:
        return self.current.desired_slots

    @property
    def settled(self) -> bool:
        done = settled(self.current, self.candidate, self.memory, time.monotonic())
        return bool(self.observed) and done

    def ready(self) -> list[str]:
        return [id_ for id_, record in self.memory.records.items() if record.state == "ready"]

    def generation_of(self, id_: str) -> Generation:
        """The generation that the slot's worker was started with."""
        spec = self.memory.of(id_).spec
        for generation in reversed(self.farm.generations):
            for slot in generation.plan.slots:
                if slot.id == id_ and generation.spec_of(slot) == spec:
                    return generation
        return self.farm.current

    async def run(self) -> None:
        """Work until cancelled."""
        rotated = time.monotonic()
        while True:
            self._wake.clear()
            await self._guarded(self.step)
            if time.monotonic() - rotated > ROTATE_INTERVAL:
                rotated = time.monotonic()
                await self._guarded(lambda: asyncio.to_thread(self._keep_logs))
            busy = not self.settled or time.monotonic() < self._busy_until
            with suppress(TimeoutError):
                async with asyncio.timeout(BUSY_INTERVAL if busy else CALM_INTERVAL):
                    await self._wake.wait()

    def _keep_logs(self) -> None:
        """Rotate nginx's logs, and have those opened again that were deleted."""
        rotate_balancer_logs(self.farm)
        running = [id_ for id_, record in self.memory.records.items() if record.pid]
        names = ["supervisord", "controller", *running]
        reopen_missing_logs(self.farm.state.logs, names, os.getppid())

    async def _guarded(self, work: Callable[[], Awaitable[None]]) -> None:
        """Nothing that goes wrong in one round may end the controller."""
        try:
            await work()
            self._report("")
        except (SupervisorError, StateError, ConfigError) as error:
            self._report(str(error))
        except Exception as error:
            log.exception("a round failed")
            self._report(f"{type(error).__name__}: {error}")

    def _report(self, problem: str) -> None:
        if problem and problem != self.problem:
            log.warning("%s", problem)
        self.problem = problem

    async def step(self) -> None:
        """Look, decide, act, remember."""
        async with self._lock:
            current, candidate = self.current, self.candidate
            await self._observe(current, candidate)
            before = self.memory
            decision = decide(
                current,
                candidate,
                self.memory,
                self.observed,
                now=time.monotonic(),
                load_timeout=self._longest_timeout("load_timeout"),
                liveness_timeout=self._longest_timeout("request_timeout") + GRACE_AFTER_REQUEST,
            )
            self.memory = decision.memory
            self._log_changes(before)
            if decision.verdict == "promoted":
                await self._switch_to(self.farm.promoted())
            elif decision.verdict == "given up":
                await self._switch_to(self.farm.abandoned(self.memory.rollout.error))
            # Remembered before it is done: a controller that dies in between finds the process.
            # What cannot be remembered is done all the same: a full disk must stop no replacement.
            unwritten = None
            try:
                await self._save()
            except (StateError, ConfigError) as error:
                unwritten = error
            for action in decision.actions:
                await asyncio.to_thread(self._execute, action)
            self._watch_processes()
            await self._reserve()
            if unwritten is not None:
                raise unwritten

    async def _reserve(self) -> None:
        """Let other farms know what workers that are still to load will take of the devices."""
        goal = self.candidate or self.current
        generation = self.farm.generations[-1]
        coming = [
            goal.target(id_).device
            for id_ in goal.desired_slots
            if (record := self.memory.of(id_)).state in ("starting", "stopped")
            and not record.gave_up
        ]
        need = of_starts(generation.plan, coming)
        if need != self._reserved:
            await asyncio.to_thread(reservations.reserve, self.farm.state.path, need)
            self._reserved = need

    async def _observe(self, current: Goal, candidate: Goal | None) -> None:
        starts = {
            id_: start
            for id_ in rollout.desired_slots(current, candidate, self.memory)
            if (start := self._start_of(id_, current, candidate)) is not None
        }
        external = {id_ for id_ in self.memory.records if self.generation_of(id_).is_external}
        observed = await asyncio.to_thread(self._observer.observe, self.memory, starts, external)
        self.observed = {
            id_: await self._observer.with_readiness(id_, observation, self.generation_of(id_))
            if observation.alive
            and not observation.stopping
            and self.memory.of(id_).state != "ready"
            else observation
            for id_, observation in observed.items()
        }
        await self._probe_liveness()

    def _start_of(self, id_: str, current: Goal, candidate: Goal | None) -> Start | None:
        goal = rollout.goal_of(id_, current, candidate, self.memory)
        generation = self.farm.candidate if goal is candidate else self.farm.current
        if generation is None or id_ not in goal.by_id:
            return None
        slot = next(slot for slot in generation.plan.slots if slot.id == id_)
        return Start(generation, generation.plan.device_of(slot))

    def _longest_timeout(self, key: str) -> float:
        workers = [generation.settings.workers for generation in self.farm.generations]
        return max(float(getattr(settings, key)) for settings in workers)

    async def _probe_liveness(self) -> None:
        """Ask the ready workers whether they answer at all. Ours do so whatever the model does,
        and are never silent for longer than a request may take; an external server may be."""
        ready = {
            id_: self.observed[id_].pid
            for id_ in self.ready()
            if id_ in self.observed and not self.generation_of(id_).is_external
        }
        if time.monotonic() - self._liveness_probed > LIVENESS_INTERVAL:
            self._liveness_probed = time.monotonic()
            answered_all = await asyncio.gather(*map(self._observer.is_live, ready))
            self._unresponsive_since = {
                pid: self._unresponsive_since.get(pid, self._liveness_probed)
                for pid, answered in zip(ready.values(), answered_all, strict=True)
                if not answered
            }
        for id_, pid in ready.items():
            if (since := self._unresponsive_since.get(pid)) is not None:
                unresponsive = self._liveness_probed - since
                self.observed[id_] = replace(self.observed[id_], unresponsive=unresponsive)

    def _execute(self, action: Action) -> None:
        """Carry an action out. One that fails is decided again in the next round."""
        log.info("%s %s", action.do, action.id)
        try:
            if action.do == "start":
                self._start(action.id)
            elif action.do == "drain":
                self._supervisor.stop(action.id)
            else:
                self._supervisor.kill(action.id)
        except (SupervisorError, StateError, ConfigError) as error:
            log.warning("%s %s: %s", action.do, action.id, error)

    def _start(self, id_: str) -> None:
        generation = self.generation_of(id_)
        slot = next(slot for slot in generation.plan.slots if slot.id == id_)
        farms.write_launch(self.farm, generation, slot)
        if generation.is_external:  # it does not set SO_REUSEPORT
            self._observer.held.release(self.farm.port_of(id_))
        self._supervisor.start(id_)

    def _log_changes(self, before: Memory) -> None:
        for id_, record in self.memory.records.items():
            if record.state != before.of(id_).state:
                suffix = f": {record.error}" if record.error else ""
                log.info("%s is %s%s", id_, record.state, suffix)

    async def _save(self) -> None:
        now = (self.desired, self.memory)
        if now != self._stored:
            await asyncio.to_thread(self.store.write, *now)
            self._stored = now

    async def _switch_to(self, farm: Farm) -> None:
        """Another generation is current, or no candidate is left."""
        if farm.failure:
            log.warning("generation %d stays: %s", farm.current.number, farm.failure)
        elif farm.current.number != self.farm.current.number:
            log.info("generation %d is current", farm.current.number)
        self.farm = self._observer.farm = farm
        logs.set_up(farm.settings.logs.format)
        try:
            await asyncio.to_thread(farms.save, farm)
        except (StateError, ConfigError) as error:  # a controller after this one decides it again
            self._report(str(error))

    def _watch_processes(self) -> None:
        """Wake up at the moment in which a worker ends, rather than at the next look."""
        pids = {observation.pid for observation in self.observed.values() if observation.alive}
        loop = asyncio.get_running_loop()
        for pid in pids - set(self._pidfds):
            with suppress(OSError):
                fd = os.pidfd_open(pid)
                self._pidfds[pid] = fd
                loop.add_reader(fd, self._process_ended, pid)
        for pid in set(self._pidfds) - pids:
            self._close_pidfd(pid)

    def _process_ended(self, pid: int) -> None:
        self._close_pidfd(pid)
        self.wake()

    def _close_pidfd(self, pid: int) -> None:
        fd = self._pidfds.pop(pid, None)
        if fd is not None:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)

    def wake(self) -> None:
        """Look again now, and often for a while."""
        self._busy_until = time.monotonic() + BUSY_AFTER_EVENT
        self._wake.set()

    async def scale(self, count: int | None) -> tuple[str, ...]:
        """Have ``count`` workers, or as many as the configuration says for None.

        Returns warnings; raises RefusedError with the numbers.
        """
        plan, drained = self.farm.plan, self.current.drained
        if count is not None:
            if refusal := plan.refusal_for(count):
                raise RefusedError(refusal)
            if count > plan.capacity - len(drained):
                names = ", ".join(sorted(drained))
                raise RefusedError(
                    f"{count} workers do not fit: {plan.capacity - len(drained)} of "
                    f"{plan.capacity} slots may be used, {names} drained; refill with "
                    f"`gpufarm restart {names.split(', ')[0]}`"
                )
            await self._check_room(count)
        async with self._lock:
            self.memory = self.memory.reset(tuple(self.current.by_id))
            used = None if count is None else count + len(drained)
            await self._set_desired(replace(self.desired, count=used))
        return plan.warnings_for(len(self.desired_slots))

    async def _check_room(self, count: int) -> None:
        """Raises RefusedError where the memory that is free now does not hold the new ones."""
        desired = replace(self.desired, count=count + len(self.current.drained))
        generation = self.farm.current
        goal = Goal.of(self.current.targets, generation.plan.count, desired)
        new = [id_ for id_ in goal.desired_slots if not self.memory.of(id_).alive]
        devices = [goal.target(id_).device for id_ in new]
        refusal = await asyncio.to_thread(refusal_for, generation, devices)
        if refusal:
            raise RefusedError(f"{len(new)} more cannot start now: {refusal}")

    async def drain(self, id_: str) -> None:
        """Empty a slot and keep it empty."""
        self._check_slot(id_)
        async with self._lock:
            if id_ in self.desired.drained:
                return
            if id_ not in self.desired_slots:
                raise RefusedError(f"{id_} has no worker to drain; workers: {self._worker_names()}")
            self.memory = self.memory.reset((id_,))
            drained = self.desired.drained | {id_}
            await self._set_desired(replace(self.desired, drained=drained))

    async def restart(self, ids: tuple[str, ...] = ()) -> None:
        """Replace workers in turn, all of them where none is named; refill drained slots."""
        for id_ in ids:
            self._check_slot(id_)
            if id_ not in (*self.desired_slots, *self.desired.drained):
                raise RefusedError(
                    f"{id_} has no worker to restart; workers: {self._worker_names()}. "
                    f"`gpufarm scale` adds workers"
                )
        async with self._lock:
            desired = replace(self.desired, drained=self.desired.drained - set(ids))
            goal = Goal.of(self.current.targets, self.farm.plan.count, desired)
            chosen = ids or goal.desired_slots
            self.memory = rollout.begin(self.memory.reset(chosen), chosen)
            await self._set_desired(desired)

    async def roll_out(self, number: int, follow: bool) -> None:
        """Take up a generation that `up` has written. ``follow``: the count that the user had
        scaled to is superseded by the configuration's."""
        farm = self.farm
        if number == farm.current.number:
            fresh = replace(farm, candidate=None, failure="")
        else:
            generation = await asyncio.to_thread(farms.load_generation, farm.state, number)
            if generation is None:
                raise RefusedError(f"generation {number} is not on disk; run `gpufarm up`")
            ports = await asyncio.to_thread(farm.state.ports)
            fresh = replace(farm, candidate=generation, failure="", ports=ports)
        async with self._lock:
            try:
                await asyncio.to_thread(farms.save, fresh)
            except (StateError, ConfigError) as error:
                raise RefusedError(str(error), status=507) from None
            self.farm = self._observer.farm = fresh
            ids = {slot.id for generation in fresh.generations for slot in generation.plan.slots}
            self.memory = self.memory.reset(tuple(sorted(ids)))
            if candidate := self.candidate:
                self.memory = rollout.begin_candidate(self.memory, candidate)
            count = None if follow else self.desired.count
            await self._set_desired(Desired(count, self.desired.drained & ids))

    def _worker_names(self) -> str:
        return ", ".join(self.desired_slots) or "none"

    def _check_slot(self, id_: str) -> None:
        ids = list(self.current.by_id)
        if id_ not in ids:
            raise RefusedError(f"no worker {id_}; slots: {', '.join(ids)}", status=404)

    async def _set_desired(self, desired: Desired) -> None:
        """Raises RefusedError where it cannot be written down: then it is not desired either."""
        before, self.desired = self.desired, desired
        try:
            await self._save()
        except (StateError, ConfigError) as error:
            self.desired = before
            raise RefusedError(str(error), status=507) from None
        self.wake()
