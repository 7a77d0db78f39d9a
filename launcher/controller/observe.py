"""Observe the slots: supervisord's processes, ports, devices, and leftovers of dead workers."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace

import psutil

from launcher.config.sizes import format_size
from launcher.controller.model import Memory, Observation
from launcher.controller.probe import READY_BELOW, NoResponseError, get
from launcher.planning import sizing
from launcher.planning.devices import CPU
from launcher.planning.inventory import Device
from launcher.planning.nvml import Driver
from launcher.planning.sampling import tree_pss
from launcher.supervision import leftovers
from launcher.supervision.exit_reason import exit_reason_since
from launcher.supervision.farm import Farm, Generation
from launcher.supervision.supervisord import GRACE_AFTER_REQUEST, LOGS, ProcessInfo, Supervisor

PROBE_SECONDS = 2.0
"""Timeout of a probe in seconds."""
MEMORY_SECONDS = 30.0
"""Seconds that the driver may still list a process that has ended."""


@dataclass(frozen=True)
class Start:
    """The generation and device that a slot would start with."""

    generation: Generation
    device: Device


class Observer:
    """Observes the slots of a farm. ``observe`` blocks: call it in a thread."""

    def __init__(self, farm: Farm, supervisor: Supervisor) -> None:
        self.farm = farm
        self._supervisor = supervisor
        self._clear: set[str] = set()
        """Empty slots known to be free of what was there before."""
        self._gone_since: dict[str, float] = {}
        self._last_pid: dict[str, int] = {}

    def observe(
        self, memory: Memory, starts: Mapping[str, Start], external: Collection[str]
    ) -> dict[str, Observation]:
        """Observe every slot of supervisord, except its readiness. Raises SupervisorError.

        ``starts``: the slots that should have a worker, and how it would start. ``external``: the
        slots whose running worker is an external server.
        """
        infos = {
            id_: info
            for id_, info in self._supervisor.processes().items()
            if id_[:1] == "w" and id_[1:].isdecimal()
        }
        shareable = [id_ for id_, info in infos.items() if not (info.alive and id_ in external)]
        taken = self._supervisor.hold([self.farm.port_of(id_) for id_ in shareable])
        return {
            id_: self._slot(id_, info, memory, starts.get(id_), taken)
            for id_, info in infos.items()
        }

    def _slot(
        self,
        id_: str,
        info: ProcessInfo,
        memory: Memory,
        start: Start | None,
        taken: Collection[int],
    ) -> Observation:
        port = self.farm.port_of(id_)
        if info.alive:
            self._clear.discard(id_)
            self._gone_since.pop(id_, None)
            self._last_pid[id_] = info.pid
            return Observation(
                alive=True, stopping=info.stopping, pid=info.pid, started=info.started
            )
        record = memory.of(id_)
        may_start = start is not None and record.state == "stopped"
        clear, no_room = True, ""
        if start is not None and may_start:
            clear = self._is_clear(id_, start.device, drained=record.crashes == 0)
            no_room = _no_room(start) if clear else ""
        else:
            self._end_leftovers(id_)
        log = self.farm.state.path / LOGS / f"{id_}.log"
        return Observation(
            started=info.started,
            exit_code=info.exit_code if info.started else None,
            clear=clear,
            taken_by=listener_of(port) if port in taken else "",
            no_room=no_room,
            exit_reason=exit_reason_since(log, info.started) if record.alive else "",
        )

    def _is_clear(self, id_: str, device: Device, drained: bool) -> bool:
        """Return whether nothing is left of the slot's last worker; end what is.

        ``drained``: it was sent its stop signal. Then a server whose wrapper has ended may finish.
        """
        if id_ in self._clear:
            return True
        since = self._gone_since.setdefault(id_, time.monotonic())
        if left := leftovers.marked(self.farm.state.path, id_):
            if drained and time.monotonic() - since < self._grace:
                return False
            leftovers.kill(left)
        waited = time.monotonic() - since
        if device.is_gpu and waited < MEMORY_SECONDS and self._holds_memory(id_, device):
            return False
        self._clear.add(id_)
        return True

    @property
    def _grace(self) -> float:
        return self.farm.settings.workers.request_timeout + GRACE_AFTER_REQUEST

    def _end_leftovers(self, id_: str) -> None:
        """End leftover processes of a stopped worker after the grace period."""
        if id_ in self._clear or id_ not in self._last_pid:
            return
        since = self._gone_since.setdefault(id_, time.monotonic())
        if time.monotonic() - since > self._grace:
            leftovers.kill(leftovers.marked(self.farm.state.path, id_))
            self._clear.add(id_)

    def _holds_memory(self, id_: str, device: Device) -> bool:
        """Return whether the driver still lists the slot's last process."""
        driver = Driver.open()
        if driver is None:
            return False
        with driver:
            try:
                tenants = {tenant.pid for tenant in driver.tenants(device.id)}
            except LookupError:
                return False
        return self._last_pid.get(id_) in tenants

    async def with_readiness(
        self, id_: str, observation: Observation, generation: Generation
    ) -> Observation:
        """Return the observation with the result of the worker's readiness probe."""
        external = generation.is_external
        path = generation.settings.model.ready_url if external else "/readyz"
        try:
            status, _ = await get(self.farm.port_of(id_), path, PROBE_SECONDS)
        except NoResponseError:
            return observation
        # Without a configured path the server need not have a page at "/": any response will do.
        any_page = external and path == "/" and status < 500
        ready = status < READY_BELOW or any_page
        key = " (model.ready_url)" if external else ""
        return replace(observation, ready=ready, answer=f"{path}{key} returned {status}")

    async def is_live(self, id_: str) -> bool:
        """Return whether the slot's worker responds to /livez; not for external servers."""
        try:
            await get(self.farm.port_of(id_), "/livez", PROBE_SECONDS)
        except NoResponseError:
            return False
        return True


def refusal_for(generation: Generation, devices: Sequence[str]) -> str:
    """Return why new workers do not fit into the memory that is free now; empty if they do.

    ``devices`` holds one entry a worker.
    """
    footprint = generation.plan.footprint
    for row in generation.plan.devices:
        if not (more := devices.count(row.id)):
            continue
        need = more * footprint.steady + footprint.peak - footprint.steady
        free = free_memory(generation, row.device)
        if free is not None and need > free - row.headroom:
            return (
                f"they need {format_size(need)} of {row.device.name}, and {format_size(free)} are "
                f"free, of which {format_size(row.headroom)} are headroom"
            )
    return ""


def _no_room(start: Start) -> str:
    """Return why the device has no memory for one more worker now; empty if it has."""
    need, device = start.generation.plan.footprint.peak, start.device
    free = free_memory(start.generation, device)
    if free is None or free >= need:
        return ""
    return (
        f"it needs {format_size(need)} of {device.name}, and {format_size(free)} are free; "
        f"it starts as soon as there is room"
    )


def free_memory(generation: Generation, device: Device) -> int | None:
    """Return the bytes free on a device now; None if the driver does not report them."""
    if not device.is_gpu:
        return sizing.read_host(generation.settings).ram_free
    driver = Driver.open()
    if driver is None:
        return None
    with driver:
        try:
            return driver.free(device.id)
        except LookupError:
            return None


def listener_of(port: int) -> str:
    """Name the process that listens on a port, for an error message."""
    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            mine = connection.laddr and connection.laddr.port == port
            if mine and connection.status == psutil.CONN_LISTEN and connection.pid:
                name = psutil.Process(connection.pid).name()
                return f"pid {connection.pid} ({name}), port {port}"
    return f"another process, port {port}"


def device_memory(holders: Mapping[str, tuple[int, str]]) -> dict[str, int]:
    """Return the bytes that each slot's worker holds: on its GPU if reported, else in RAM.

    ``holders``: slot → pid and device id.
    """
    held = {}
    on_gpu = any(device != CPU for _, device in holders.values())
    driver = Driver.open() if on_gpu else None
    with driver or nullcontext():
        for id_, (pid, device) in holders.items():
            if driver is None or device == CPU:
                held[id_] = tree_pss(pid)
                continue
            family = {pid}
            with suppress(psutil.Error):
                family |= {child.pid for child in psutil.Process(pid).children(recursive=True)}
            # In a container the driver lists the host's pids, which match no process here.
            if own := [t.bytes for t in driver.tenants(device) if t.pid in family and t.bytes]:
                held[id_] = sum(own)
    return held
