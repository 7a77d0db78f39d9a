"""The controller loop: compare the desired with the observed state, and act.

It may be killed at any time: requests do not pass through it, and its memory is stored in a file.
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
"""Seconds between two rounds, while something is under way and otherwise."""
BUSY_AFTER_EVENT = 3.0
"""Seconds of short intervals after an event."""
ROTATE_INTERVAL = 15.0
"""Seconds between two rotations of nginx's logs."""
LIVENESS_INTERVAL = 5.0
"""Seconds between two liveness probes of every ready worker."""


class RefusedError(Exception):
    """A command cannot be carried out; ``status`` is the HTTP status for it."""

    def __init__(self, message: str, status: int = 409) -> None:
        super().__init__(message)
        self.status = status


class Controller:
    """Keeps one farm in its desired state. The constructor does nothing; ``run`` loops."""

    def __init__(self, farm: Farm, supervisor: Supervisor) -> None:
        self.farm = farm
        self.store = Store(farm.state)
        self.desired, self.memory = self.store.read()
        self.observed: dict[str, Observation] = {}
        self.problem = ""
        """Why the last round failed; empty if it did not."""
        self._supervisor = supervisor
        self._observer = Observer(farm, supervisor)
        self._wake = asyncio.Event()
        self._busy_until = 0.0
        self._pidfds: dict[int, int] = {}
        """pid → pidfd"""
        self._liveness_probed = 0.0
        self._unresponsive_since: dict[int, float] = {}
        """pid → its first failed liveness probe (monotonic seconds)"""
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
        """Return the generation that the slot's worker was started with."""
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
        """Rotate nginx's logs, and have deleted logs reopened."""
        rotate_balancer_logs(self.farm)
        running = [id_ for id_, record in self.memory.records.items() if record.pid]
        names = ["supervisord", "controller", *running]
        reopen_missing_logs(self.farm.state.logs, names, os.getppid())

    async def _guarded(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run ``work``; report any error, so that a failed round does not end the controller."""
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
        """Observe, decide, save, act."""
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
            # Saved before acting: after a crash in between the next controller finds the process.
            # Actions follow even if saving fails: a full disk must not stop a replacement.
            unwritten = None
            try:
                await self._save()
            except (StateError, ConfigError) as error:
                unwritten = error
            for action in decision.actions:
                await asyncio.to_thread(self._execute, action)
            self._watch_processes()
            await self._reserve()
            self._check_ports()
            if unwritten is not None:
                raise unwritten

    def _check_ports(self) -> None:
        """Raise SupervisorError if something else has a slot's port: nginx sends requests there."""
        for id_, observation in sorted(self.observed.items()):
            if observation.taken_by and not observation.alive:
                raise SupervisorError(
                    f"the port of {id_} is taken by {observation.taken_by}, which may be sent "
                    f"requests: end it, or `gpufarm down` and `up` for other ports"
                )

    async def _reserve(self) -> None:
        """Reserve the device memory of workers that are still to load, for other farms to see."""
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
        """Probe the liveness of ready workers, except external servers.

        Our workers respond whatever the model does; an external server may block on a request.
        """
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
        """Carry out an action. If it fails, the next round decides it again."""
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

    async def _save(self) -> None:
        now = (self.desired, self.memory)
        if now != self._stored:
            await asyncio.to_thread(self.store.write, *now)
            self._stored = now

    async def _switch_to(self, farm: Farm) -> None:
        """Switch to a farm with another current generation or without a candidate."""
        if farm.failure:
            log.warning("generation %d stays: %s", farm.current.number, farm.failure)
        elif farm.current.number != self.farm.current.number:
            log.info("generation %d is current", farm.current.number)
        self.farm = self._observer.farm = farm
        logs.set_up(farm.settings.logs.format)
        try:
            await asyncio.to_thread(farms.save, farm)
        except (StateError, ConfigError) as error:  # the next controller decides it again
            self._report(str(error))

    def _watch_processes(self) -> None:
        """Wake up as soon as a worker's process ends, by its pidfd."""
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
        """Start the next round now, and use short intervals for a while."""
        self._busy_until = time.monotonic() + BUSY_AFTER_EVENT
        self._wake.set()

    async def scale(self, count: int | None) -> tuple[str, ...]:
        """Scale to ``count`` workers, or to the configured count for None.

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
            await self._set_desired(replace(self.desired, count=used), memory)
        return plan.warnings_for(len(self.desired_slots))

    async def _check_room(self, count: int) -> None:
        """Raise RefusedError if the new workers do not fit into the memory that is free now."""
        desired = replace(self.desired, count=count + len(self.current.drained))
        generation = self.farm.current
        goal = Goal.of(self.current.targets, generation.plan.count, desired)
        new = [id_ for id_ in goal.desired_slots if not self.memory.of(id_).alive]
        devices = [goal.target(id_).device for id_ in new]
        refusal = await asyncio.to_thread(refusal_for, generation, devices)
        if refusal:
            raise RefusedError(f"{len(new)} more cannot start now: {refusal}")

    async def drain(self, id_: str) -> None:
        """Drain a slot's worker and keep the slot empty."""
        self._check_slot(id_)
        async with self._lock:
            if id_ in self.desired.drained:
                return
            if id_ not in self.desired_slots:
                raise RefusedError(
                    f"{id_} has no worker to drain; workers: {self._worker_names()}", 404
                )
            drained = self.desired.drained | {id_}
            await self._set_desired(
                replace(self.desired, drained=drained), self.memory.reset((id_,))
            )

    async def restart(self, ids: tuple[str, ...] = ()) -> None:
        """Restart workers one after another, all of them without ``ids``; refill drained slots."""
        for id_ in ids:
            self._check_slot(id_)
            if id_ not in (*self.desired_slots, *self.desired.drained):
                raise RefusedError(
                    f"{id_} has no worker to restart; workers: {self._worker_names()}. "
                    f"`gpufarm scale` adds workers",
                    404,
                )
        async with self._lock:
            desired = replace(self.desired, drained=self.desired.drained - set(ids))
            goal = Goal.of(self.current.targets, self.farm.plan.count, desired)
            chosen = ids or goal.desired_slots
            if not chosen:
                raise RefusedError(
                    "no worker to restart: none is desired; `gpufarm scale 1` starts one, "
                    "`gpufarm restart w1` refills a drained slot",
                    404,
                )
            await self._set_desired(desired, rollout.begin(self.memory.reset(chosen), chosen))

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
                await self._set_desired(Desired(count, self.desired.drained & ids), memory)
            except RefusedError:
                self.farm = self._observer.farm = farm
                with suppress(StateError, ConfigError):
                    await asyncio.to_thread(farms.save, farm)
                raise

    def _worker_names(self) -> str:
        return ", ".join(self.desired_slots) or "none"

    def _check_slot(self, id_: str) -> None:
        ids = list(self.current.by_id)
        if id_ not in ids:
            raise RefusedError(f"no worker {id_}; slots: {', '.join(ids)}", status=404)

    async def _set_desired(self, desired: Desired, memory: Memory) -> None:
        """Raises RefusedError where it cannot be written down: then nothing has changed."""
        before = self.desired, self.memory
        self.desired, self.memory = desired, memory
        try:
            await self._save()
        except (StateError, ConfigError) as error:
            self.desired, self.memory = before
            raise RefusedError(str(error), status=507) from None
        self.wake()
