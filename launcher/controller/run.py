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
from launcher.controller.model import Action, Desired, Goal, Memory, Observation, Rollout, Target
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
LISTEN_INTERVAL = 5.0
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
        self._watched: dict[int, int] = {}
        """pid → pidfd"""
        self._listened = 0.0
        self._silent_since: dict[int, float] = {}
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
    def wanted(self) -> tuple[str, ...]:
        return self.current.wanted

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
            await self._look(current, candidate)
            before = self.memory
            decision = decide(
                current,
                candidate,
                self.memory,
                self.observed,
                now=time.monotonic(),
                load_timeout=self._longest("load_timeout"),
                silence=self._longest("request_timeout") + GRACE_AFTER_REQUEST,
            )
            self.memory = decision.memory
            self._log_changes(before)
            if decision.verdict == "promoted":
                await self._become(self.farm.promoted())
            elif decision.verdict == "given up":
                await self._become(self.farm.abandoned(self.memory.rollout.error))
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
            await self._reserve()
            self._look_for_strangers()
            if unwritten is not None:
                raise unwritten

    def _look_for_strangers(self) -> None:
        """Raises SupervisorError where something else has a slot's port: nginx lists it."""
        for id_, seen in sorted(self.observed.items()):
            if seen.taken_by and not seen.alive:
                raise SupervisorError(
                    f"the port of {id_} is taken by {seen.taken_by}, which may be sent requests: "
                    f"end it, or `gpufarm down` and `up` for other ports"
                )

    async def _reserve(self) -> None:
        """Let other farms know what workers that are still to load will take of the devices."""
        goal = self.candidate or self.current
        generation = self.farm.generations[-1]
        coming = [
            goal.target(id_).device
            for id_ in goal.wanted
            if (record := self.memory.of(id_)).state in ("starting", "stopped")
            and not record.gave_up
        ]
        need = of_starts(generation.plan, coming)
        if need != self._reserved:
            await asyncio.to_thread(reservations.reserve, self.farm.state.path, need)
            self._reserved = need

    async def _look(self, current: Goal, candidate: Goal | None) -> None:
        starts = {
            id_: start
            for id_ in rollout.wanted(current, candidate, self.memory)
            if (start := self._start_of(id_, current, candidate)) is not None
        }
        external = {id_ for id_ in self.memory.records if self.generation_of(id_).is_external}
        observed = await asyncio.to_thread(self._observer.look, self.memory, starts, external)
        self.observed = {
            id_: await self._observer.asked(id_, seen, self.generation_of(id_))
            if seen.alive and not seen.stopping and self.memory.of(id_).state != "ready"
            else seen
            for id_, seen in observed.items()
        }
        await self._listen()

    def _start_of(self, id_: str, current: Goal, candidate: Goal | None) -> Start | None:
        goal = rollout.goal_of(id_, current, candidate, self.memory)
        generation = self.farm.candidate if goal is candidate else self.farm.current
        if generation is None or id_ not in goal.by_id:
            return None
        slot = next(slot for slot in generation.plan.slots if slot.id == id_)
        return Start(generation, generation.plan.device_of(slot))

    def _longest(self, key: str) -> float:
        workers = [generation.settings.workers for generation in self.farm.generations]
        return max(float(getattr(settings, key)) for settings in workers)

    async def _listen(self) -> None:
        """Ask the ready workers whether they answer at all. Ours do so whatever the model does,
        and are never silent for longer than a request may take; an external server may be."""
        ready = {
            id_: self.observed[id_].pid
            for id_ in self.ready()
            if id_ in self.observed and not self.generation_of(id_).is_external
        }
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
                self.observed[id_] = replace(self.observed[id_], silent=silent)

    def _act(self, action: Action) -> None:
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
            self._supervisor.release(self.farm.port_of(id_))
        self._supervisor.start(id_)

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

    async def _become(self, farm: Farm) -> None:
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

    def _watch(self) -> None:
        """Wake up at the moment in which a worker ends, rather than at the next look."""
        pids = {seen.pid for seen in self.observed.values() if seen.alive}
        loop = asyncio.get_running_loop()
        for pid in pids - set(self._watched):
            with suppress(OSError):
                fd = os.pidfd_open(pid)
                self._watched[pid] = fd
                loop.add_reader(fd, self._process_ended, pid)
        for pid in set(self._watched) - pids:
            self._forget(pid)

    def _process_ended(self, pid: int) -> None:
        self._forget(pid)
        self.wake()

    def _forget(self, pid: int) -> None:
        fd = self._watched.pop(pid, None)
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
            used = None if count is None else count + len(drained)
            memory = self.memory.reset(tuple(self.current.by_id))
            await self._desire(replace(self.desired, count=used), memory)
        return plan.warnings_for(len(self.wanted))

    async def _check_room(self, count: int) -> None:
        """Raises RefusedError where the memory that is free now does not hold the new ones."""
        desired = replace(self.desired, count=count + len(self.current.drained))
        generation = self.farm.current
        goal = Goal.of(self.current.targets, generation.plan.count, desired)
        new = [id_ for id_ in goal.wanted if not self.memory.of(id_).alive]
        devices = [goal.target(id_).device for id_ in new]
        refusal = await asyncio.to_thread(refusal_for, generation, devices)
        if refusal:
            raise RefusedError(f"{len(new)} more cannot start now: {refusal}")

    async def drain(self, id_: str) -> None:
        """Empty a slot and keep it empty."""
        self._check(id_)
        async with self._lock:
            if id_ in self.desired.drained:
                return
            if id_ not in self.wanted:
                raise RefusedError(f"{id_} has no worker to drain; workers: {self._named()}", 404)
            drained = self.desired.drained | {id_}
            await self._desire(replace(self.desired, drained=drained), self.memory.reset((id_,)))

    async def restart(self, ids: tuple[str, ...] = ()) -> None:
        """Replace workers in turn, all of them where none is named; refill drained slots."""
        for id_ in ids:
            self._check(id_)
            if id_ not in (*self.wanted, *self.desired.drained):
                raise RefusedError(
                    f"{id_} has no worker to restart; workers: {self._named()}. `gpufarm scale` "
                    f"adds workers",
                    404,
                )
        async with self._lock:
            desired = replace(self.desired, drained=self.desired.drained - set(ids))
            goal = Goal.of(self.current.targets, self.farm.plan.count, desired)
            chosen = ids or goal.wanted
            if not chosen:
                raise RefusedError(
                    "no worker to restart: none is wanted; `gpufarm scale 1` starts one, "
                    "`gpufarm restart w1` refills a drained slot",
                    404,
                )
            await self._desire(desired, rollout.begin(self.memory.reset(chosen), chosen))

    async def roll_out(self, number: int, base: int, follow: bool) -> None:
        """Take up a generation that `up` has written for the generation ``base``.

        ``follow``: the count that the user had scaled to is superseded by the configuration's.
        Raises RefusedError with status 412 where another one has become current meanwhile.
        """
        async with self._lock:
            farm = self.farm
            if base != farm.current.number:
                raise RefusedError(
                    "another command has changed the farm meanwhile; run `gpufarm up` again", 412
                )
            fresh = replace(farm, candidate=None, failure="")
            if number != farm.current.number:
                generation = await asyncio.to_thread(farms.load_generation, farm.state, number)
                if generation is None:
                    raise RefusedError(f"generation {number} is not on disk; run `gpufarm up`", 412)
                ports = tuple(slot.port for slot in generation.plan.slots)
                recorded = await asyncio.to_thread(farm.state.ports)
                longest = max(farm.ports, recorded, ports, key=len)
                fresh = replace(fresh, candidate=generation, ports=longest)
            ids = {slot.id for generation in fresh.generations for slot in generation.plan.slots}
            memory = replace(self.memory.reset(tuple(sorted(ids))), rollout=Rollout())
            count = None if follow else self.desired.count
            try:
                await asyncio.to_thread(farms.save, fresh)
            except (StateError, ConfigError) as error:
                raise RefusedError(str(error), status=507) from None
            self.farm = self._observer.farm = fresh
            try:
                await self._desire(Desired(count, self.desired.drained & ids), memory)
            except RefusedError:
                self.farm = self._observer.farm = farm
                with suppress(StateError, ConfigError):
                    await asyncio.to_thread(farms.save, farm)
                raise

    def _named(self) -> str:
        return ", ".join(self.wanted) or "none"

    def _check(self, id_: str) -> None:
        ids = list(self.current.by_id)
        if id_ not in ids:
            raise RefusedError(f"no worker {id_}; slots: {', '.join(ids)}", status=404)

    async def _desire(self, desired: Desired, memory: Memory) -> None:
        """Raises RefusedError where it cannot be written down: then nothing has changed."""
        before = self.desired, self.memory
        self.desired, self.memory = desired, memory
        try:
            await self._remember()
        except (StateError, ConfigError) as error:
            self.desired, self.memory = before
            raise RefusedError(str(error), status=507) from None
        self.wake()
