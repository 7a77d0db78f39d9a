"""`gpufarm up`: start a farm, or refresh the running one from its configuration."""

from __future__ import annotations

import errno
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import psutil

from balancer import processes as nginx_processes
from balancer import reload as nginx_reload
from balancer.start import why_not_free
from launcher.cli.client import (
    Client,
    poll_until,
    retry_while_unavailable,
    supervisor_answers,
)
from launcher.cli.down import remove_runtime_files, stop_seconds
from launcher.config.settings import ConfigError, Settings
from launcher.config.sizes import format_size
from launcher.config.state import StateDir, read_json, write_json
from launcher.planning import reservations, sizing
from launcher.planning.devices import CPU, discover
from launcher.planning.held import Held, about_to_use, held_by
from launcher.planning.inventory import Device
from launcher.planning.plan import DoesNotFit, Plan
from launcher.planning.sampling import tree_pss
from launcher.supervision import farm as farms
from launcher.supervision import leftovers, ports, supervisord, worker_command
from launcher.supervision.exit_reason import exit_reason
from launcher.supervision.farm import Farm, Generation
from launcher.supervision.measurement_worker import measurement_start
from launcher.supervision.supervisord import Supervisor

SUPERVISOR_SECONDS = 30.0
"""Until supervisord answers; it reads one file and starts nothing heavy."""
CONTROLLER_SECONDS = 60.0
"""How long the controller may not answer while a command waits for it."""
POLL_SECONDS = 0.2

Report = Callable[[str], None]
"""Takes one line about what a command does."""


class UpError(Exception):
    """The farm or one of its workers could not be started. Exit code 1."""


@dataclass
class Up:
    """One run of the command."""

    settings: Settings
    state: StateDir
    report: Report
    replace_other: bool = False
    """Whether a running farm of another configuration file may be replaced."""
    child: subprocess.Popen[bytes] | None = None
    """supervisord, where this command started it."""
    farm: Farm | None = None
    """The farm that is being started, as soon as it has processes."""

    def bring_up(self) -> Farm:
        """Start the farm, or refresh the running one; its workers may still be loading afterwards.

        Raises ConfigError, DoesNotFit, UpError and whatever its parts raise.
        """
        running = farms.load(self.state)
        if running is not None and supervisor_answers(running):
            return self._refresh(running)
        orphans = leftovers.find(self.state.path)
        try:
            return self._start(running, orphans)
        except BaseException:
            if self.farm is None and not orphans:  # nothing runs, so no file is needed
                remove_runtime_files(self.state)
            raise

    def _announce(self) -> None:
        file, model = self.settings.config_file, self.settings.model
        source = f"from {file}" if file else "without a gpufarm.toml"
        self.report(f"serving {model.name} ({model.target or 'model.command'}), {source}")

    def _start(self, before: Farm | None, orphans: Sequence[psutil.Process]) -> Farm:
        """Start a farm.

        ``before``: the record of a farm that was killed here; ``orphans``: its processes, which
        serve until every check has passed.
        """
        if not self._own_nginx_has_port():
            check_port(self.settings)
        self._announce()
        held = _held_by_orphans(before, orphans)
        plan = make_plan(self.settings, self.state, self.report, held)
        block = self._ports(self.state.ports(), orphans)
        self.state.record_ports(block)
        generation = Generation(
            number=1 + max((g.number for g in before.generations), default=0) if before else 1,
            settings=self.settings,
            plan=plan.with_ports(block),
            sources=worker_command.sources_digest(self.settings),
        )
        self.state.runtime()
        farm = Farm(self.state, generation, block)
        self._keep_desired(before)
        farms.render(farm)
        farms.save_generation(self.state, generation)
        for slot in generation.plan.slots:
            farms.write_launch(farm, generation, slot)
        farms.save(farm)
        if orphans:
            grace = stop_seconds(before) if before else stop_seconds(farm)
            count = leftovers.clean(self.state.path, grace)
            self.report(f"ended {count} processes of an earlier farm")
        self._spawn(farm)
        return farm

    def _own_nginx_has_port(self) -> bool:
        """Return whether an nginx left behind by this farm listens on the public port."""
        members = set(nginx_processes.all_members(self.state.path))
        return bool(members) and any(
            connection.pid in members and connection.laddr[1] == self.settings.port
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr
        )

    def _keep_desired(self, before: Farm | None) -> None:
        """Keep what was scaled or drained: it lasts until `down`, unlike the state of processes.

        A count that changed in the configuration since ``before`` supersedes an older `scale`.
        """
        desired = read_json(self.state.desired_file)
        if not isinstance(desired, dict):
            self.state.desired_file.unlink(missing_ok=True)
            return
        changed = before is None or _count(before.settings) != _count(self.settings)
        count = None if changed else desired.get("count")
        write_json(self.state.desired_file, {"count": count, "drained": desired.get("drained")})

    def _spawn(self, farm: Farm) -> None:
        self.farm = farm
        log = self.state.logs / "supervisord.out.log"
        with log.open("ab") as output:
            self.child = subprocess.Popen(
                supervisord.command(self.state.path),
                cwd=self.state.path,
                env=supervisord.environment(self.state.path),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        child, control = self.child, Supervisor(farm.socket)
        poll_until(
            lambda: control.alive() or child.poll() is not None,
            SUPERVISOR_SECONDS,
            POLL_SECONDS / 4,
        )
        if child.poll() is not None:
            raise UpError(f"supervisord ended at once: {exit_reason(log)}; see {log}")
        if not control.alive():
            raise UpError(f"supervisord does not answer; see {log}")
        control.hold(farm.ports)

    def _refresh(self, running: Farm) -> Farm:
        """Roll this configuration out to the running farm, without a gap where that is possible.

        Nothing is applied before every check of the change has passed.
        """
        old, new = running.settings, self.settings
        self._check_identity(old)
        if (old.host, old.port) != (new.host, new.port):
            check_port(new, old)
        if new.port in running.ports:
            raise ConfigError(
                f"port = {new.port} is reserved for this farm's workers; choose another with --port"
            )
        self._announce()
        plan = running.plan
        if old.planned_from != new.planned_from:
            plan = self._replan(running)
        block = ports.extend(self.state.path, running.ports, new.workers.max, public=new.port)
        generation = Generation(
            number=1 + max(generation.number for generation in running.generations),
            settings=new,
            plan=plan.with_ports(block),
            sources=worker_command.sources_digest(new),
        )
        if generation.sources != running.current.sources and plan is running.plan:
            self.report("the model's files have changed: its workers are replaced")
        if generation.same_as(running.current):
            farm = replace(running, candidate=None)
        else:
            farm = replace(running, candidate=generation, ports=block)
            farms.save_generation(self.state, generation)
            self.state.record_ports(block)
        farms.render(farm, check_only=True)
        follow = _count(old) != _count(new)
        number, base = farm.generations[-1].number, farm.current.number
        # The controller first: it refuses if another command has changed the farm meanwhile.
        view = retry_while_unavailable(
            lambda: Client(farm).roll_out(number, base, follow), CONTROLLER_SECONDS
        )
        self.apply(farm)
        self._report_scaled_count(view, plan.count)
        return farm

    def _check_identity(self, old: Settings) -> None:
        """Raise ConfigError where the running farm was started from another file."""
        new = self.settings
        same = old.config_file == new.config_file
        if same and (new.config_file or old.model == new.model):
            return
        if self.replace_other:
            return
        files = [str(file) if file else "no file" for file in (old.config_file, new.config_file)]
        raise ConfigError(
            f"the farm in {self.state.path} was started from {files[0]}, not from {files[1]}; "
            f"replace it with --replace, or start a second farm with --state-dir"
        )

    def _report_scaled_count(self, view: dict[str, Any], configured: int) -> None:
        if view["count_from"] == "scale" and view["count"] != configured:
            self.report(
                f"workers: {view['count']}, as set by `gpufarm scale`; the configuration gives "
                f"{configured}, which `gpufarm scale auto` restores"
            )

    def apply(self, farm: Farm) -> None:
        """Write the files of supervisord and nginx, and have both reload them."""
        changes = farms.render(farm)
        if changes.supervisor:
            control = Supervisor(farm.socket)
            control.update()
            control.hold(farm.ports)
            control.restart("controller")
            self.report("the supervisor has reloaded its configuration")
        if changes.balancer and nginx_reload.reload(self.state.path):
            self.report("nginx has reloaded its configuration")

    def _replan(self, running: Farm) -> Plan:
        """Plan with what is free and what the running farm's own workers hold."""
        workers = retry_while_unavailable(Client(running).workers, CONTROLLER_SECONDS)["workers"]
        held = held_by(workers, running.plan.footprint)
        return make_plan(self.settings, self.state, self.report, held)

    def _ports(
        self, recorded: tuple[int, ...], orphans: Sequence[psutil.Process]
    ) -> tuple[int, ...]:
        """Choose the slots' ports; orphans of an earlier farm keep theirs until they end."""
        size, public = self.settings.workers.max, self.settings.port
        if orphans and recorded:
            return ports.extend(self.state.path, recorded, size, public=public)
        return ports.choose(self.state.path, size, recorded, public=public)

    def finish_rollout(self) -> None:
        """Drop from nginx and supervisord what only the previous generation needed."""
        with self.state.lock(wait=CONTROLLER_SECONDS):
            farm = farms.load(self.state)
            if farm is not None and farm.candidate is None:
                self.apply(farm)


def _held_by_orphans(before: Farm | None, orphans: Sequence[psutil.Process]) -> Held:
    """Sum up what the workers of a killed farm hold until they are ended."""
    if before is None:
        return Held({CPU: sum(tree_pss(process.pid) for process in orphans)})
    device = {slot.id: slot.device_id for slot in before.plan.slots}
    workers = []
    for process in orphans:
        with suppress(psutil.Error):
            name = process.environ().get(leftovers.NAME_MARK, "")
            if name in device:
                on_cpu = device[name] == CPU
                size = tree_pss(process.pid) if on_cpu else 0
                workers.append({"pid": process.pid, "device": device[name], "memory_bytes": size})
    return held_by(workers, before.plan.footprint)


def _count(settings: Settings) -> object:
    return settings.workers.count


def check_port(settings: Settings, running: Settings | None = None) -> None:
    """Raise ConfigError where nginx could not listen on the public address.

    ``running``: the settings of this farm, where it runs.
    """
    where = f"{settings.host}:{settings.port}"
    problem = why_not_free(settings.host, settings.port)
    if problem is None:
        return
    key, cause = f"port = {settings.port}", "another program listens on"
    remedy = "choose another with --port"
    if isinstance(problem, socket.gaierror):
        key, cause = f"host = {settings.host}", "there is no such address:"
        remedy = "name one of this machine with --host"
    elif problem.errno == errno.EADDRNOTAVAIL:
        key, cause = f"host = {settings.host}", "this machine does not have the address of"
        remedy = "name one that it has with --host"
    elif problem.errno in (errno.EACCES, errno.EPERM):
        cause, remedy = "only root may listen on", "choose one from 1024 on with --port"
    elif problem.errno == errno.EADDRINUSE and running and running.port == settings.port:
        cause, remedy = "this farm's own nginx occupies", "run `gpufarm down` first"
    elif problem.errno != errno.EADDRINUSE:
        cause = f"{problem.strerror}:"
    raise ConfigError(f"{key}: {cause} {where}; {remedy}")


def make_plan(
    settings: Settings, state: StateDir, report: Report, held: Held | None = None
) -> Plan:
    """Discover devices, measure an unknown footprint, and make a plan that fits.

    ``held``: what the farm's own workers hold. What the new workers will use is reserved, so that
    another farm that starts now does not plan with it; a refusal changes no reservation.
    Raises DoesNotFit, MeasureError.
    """
    own = held or Held()
    found = discover(sizing.read_host(settings), settings.budget.devices)
    for note in found.notes:
        report(note)
    footprint = sizing.known_footprint(settings, found.devices, state)
    if footprint is None:
        try:
            footprint = sizing.measure_footprint(
                settings, found.devices, state, measurement_start(settings, state), report
            )
        except DoesNotFit as error:
            held_bytes = sum(own.devices.values())
            if not held_bytes:
                raise
            raise DoesNotFit(
                f"{error}. This farm's own workers hold {format_size(held_bytes)}: run "
                f"`gpufarm down` first, or set footprint.bytes"
            ) from None
    with reservations.locked():
        reserved = reservations.others(state.path)  # before what is free is read
        host = sizing.read_host(settings, own.ram, reserved.get(CPU, 0))
        devices = tuple(
            _with_room(device, own, reserved.get(device.id, 0))
            for device in discover(host, settings.budget.devices).devices
        )
        notes = _report_reserved(devices, reserved, report)
        plan = sizing.build_plan(settings, devices, host, footprint)
        if plan.refusal:
            raise DoesNotFit(plan.refusal + notes)
        reservations.reserve(state.path, about_to_use(plan, own))
    for warning in plan.warnings:
        report(f"warning: {warning}")
    return plan


def _with_room(device: Device, held: Held, reserved: int) -> Device:
    """Add what the farm's own workers hold, subtract what others have reserved."""
    if device.id == CPU:  # `sizing.read_host` has included both
        return device
    free = device.free + held.devices.get(device.id, 0) - reserved
    return replace(device, free=max(0, min(device.total, free)))


def _report_reserved(devices: Sequence[Device], reserved: Mapping[str, int], report: Report) -> str:
    """Report what other farms have reserved. Returns the same as the end of a refusal."""
    named = {device.id: device.name for device in devices} | {CPU: "RAM"}
    notes = [
        f"{format_size(size)} of {named[id_]} are about to be used by another farm"
        for id_, size in reserved.items()
        if id_ in named
    ]
    for note in notes:
        report(note)
    return "".join(f"; {note}" for note in notes)
