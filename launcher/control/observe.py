"""Looking at the slots: supervisord's word, the ports, what a dead worker left behind."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import nullcontext, suppress
from dataclasses import replace

import psutil

from launcher.control.probe import READY_BELOW, NoAnswerError, get
from launcher.control.reconcile import Memory, Seen
from launcher.planning.inventory import Device
from launcher.planning.nvml import Driver
from launcher.planning.sampling import tree_pss
from launcher.processes import orphans, ports
from launcher.processes.farm import Farm
from launcher.processes.last_words import words_since
from launcher.processes.supervisor import GRACE_AFTER_REQUEST, LOGS, ProcessInfo, Supervisor

PROBE_SECONDS = 2.0
MEMORY_SECONDS = 30.0
"""How long a replacement waits for device memory that does not return: somebody else took it."""


class Observer:
    """The controller's eyes. ``look`` blocks: call it in a thread."""

    def __init__(self, farm: Farm, supervisor: Supervisor) -> None:
        self.farm = farm
        self._supervisor = supervisor
        self._clear: set[str] = set()
        """Empty slots known to be free of what was there before."""
        self._gone_since: dict[str, float] = {}
        self._last_pid: dict[str, int] = {}

    def look(self, memory: Memory, wanted: Collection[str]) -> dict[str, Seen]:
        """Every slot but for its readiness. Raises SupervisorError."""
        infos = self._supervisor.processes()
        return {
            slot.id: self._slot(slot.id, slot.port, infos[slot.id], memory, slot.id in wanted)
            for slot in self.farm.plan.slots
        }

    def _slot(self, id_: str, port: int, info: ProcessInfo, memory: Memory, wanted: bool) -> Seen:
        if info.alive:
            self._clear.discard(id_)
            self._gone_since.pop(id_, None)
            self._last_pid[id_] = info.pid
            return Seen(alive=True, stopping=info.stopping, pid=info.pid)
        record = memory.of(id_)
        resting = record.state in ("stopped", "failed")
        may_start = wanted and record.state == "stopped"
        clear = self._is_clear(id_, drained=record.crashes == 0) if may_start else True
        if not may_start:
            self._sweep(id_)
        taken = clear and may_start and not ports.is_free(port)
        log = self.farm.state.path / LOGS / f"{id_}.log"
        return Seen(
            exit_code=info.exit_code if info.started else None,
            clear=clear,
            taken_by=listener_of(port) if taken else "",
            last_words="" if resting else words_since(log, info.started),
        )

    def _is_clear(self, id_: str, drained: bool) -> bool:
        """Whether nothing is left of the slot's last worker; ends what is.

        ``drained``: it was told to end. Then a server whose wrapper has gone already may finish.
        """
        if id_ in self._clear:
            return True
        since = self._gone_since.setdefault(id_, time.monotonic())
        if left := orphans.children_of(self.farm.socket, id_):
            if drained and time.monotonic() - since < self._grace:
                return False
            orphans.kill(left)
        slot = next(slot for slot in self.farm.plan.slots if slot.id == id_)
        device = self.farm.plan.device_of(slot)
        waited = time.monotonic() - since
        if device.is_gpu and waited < MEMORY_SECONDS and not self._memory_is_back(id_, device):
            return False
        self._clear.add(id_)
        return True

    @property
    def _grace(self) -> float:
        return self.farm.settings.workers.request_timeout + GRACE_AFTER_REQUEST

    def _sweep(self, id_: str) -> None:
        """End what a stopped worker's process has left behind, once it had time to finish."""
        if id_ in self._clear or id_ not in self._last_pid:
            return
        since = self._gone_since.setdefault(id_, time.monotonic())
        if time.monotonic() - since > self._grace:
            orphans.kill(orphans.children_of(self.farm.socket, id_))
            self._clear.add(id_)

    def _memory_is_back(self, id_: str, device: Device) -> bool:
        driver = Driver.open()
        if driver is None:
            return True
        with driver:
            try:
                tenants = {tenant.pid for tenant in driver.tenants(device.id)}
                free = driver.free(device.id)
            except LookupError:
                return True
        return self._last_pid.get(id_) not in tenants and free >= self.farm.plan.footprint.peak

    async def asked(self, id_: str, sight: Seen) -> Seen:
        """What is seen of a slot, and whether its worker answers its readiness path."""
        slot = next(slot for slot in self.farm.plan.slots if slot.id == id_)
        model = self.farm.settings.model
        path = model.ready_url if self.farm.foreign else "/readyz"
        try:
            status, _ = await get(slot.port, path, PROBE_SECONDS)
        except NoAnswerError:
            return sight
        # A server that was given no path need not have a page at "/": that it answers is enough.
        any_page = self.farm.foreign and path == "/" and status < 500
        ready = status < READY_BELOW or any_page
        key = " (model.ready_url)" if self.farm.foreign else ""
        return replace(sight, ready=ready, answered=f"{path}{key} was answered {status}")

    async def answers(self, id_: str) -> bool:
        """Whether the slot's worker, one of ours, says anything at all."""
        slot = next(slot for slot in self.farm.plan.slots if slot.id == id_)
        try:
            await get(slot.port, "/livez", PROBE_SECONDS)
        except NoAnswerError:
            return False
        return True


def listener_of(port: int) -> str:
    """Who listens on a port, for an error message."""
    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            mine = connection.laddr and connection.laddr.port == port
            if mine and connection.status == psutil.CONN_LISTEN and connection.pid:
                name = psutil.Process(connection.pid).name()
                return f"pid {connection.pid} ({name}), port {port}"
    return f"another process, port {port}"


def device_memory(farm: Farm, pids: dict[str, int]) -> dict[str, int]:
    """Bytes held by each slot's worker: on its GPU as far as the driver tells, else in RAM."""
    held = {}
    driver = Driver.open() if any(plan.device.is_gpu for plan in farm.plan.devices) else None
    with driver or nullcontext():
        for slot in farm.plan.slots:
            if not (pid := pids.get(slot.id)):
                continue
            device = farm.plan.device_of(slot)
            if driver is None or not device.is_gpu:
                held[slot.id] = tree_pss(pid)
                continue
            family = {pid}
            with suppress(psutil.Error):
                family |= {child.pid for child in psutil.Process(pid).children(recursive=True)}
            # In a container the driver tells the host's numbers of processes: then nobody knows.
            if own := [t.bytes for t in driver.tenants(device.id) if t.pid in family and t.bytes]:
                held[slot.id] = sum(own)
    return held
