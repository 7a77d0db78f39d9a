"""`gpufarm up`: from a configuration to a farm whose every worker is ready."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import psutil

from balancer import processes as nginx_processes
from balancer import reload as nginx_reload
from launcher.cli.client import AwayError, Client, answers, serves
from launcher.cli.down import remove_traces, shut_down, stop_seconds
from launcher.cli.settling import Say, check_port, make_plan
from launcher.config.settings import ConfigError, Settings
from launcher.config.state import StateDir, read_json, write_json
from launcher.planning.devices import CPU
from launcher.planning.held import Held, held_by
from launcher.planning.plan import Plan
from launcher.planning.sampling import tree_pss
from launcher.supervision import farm as farms
from launcher.supervision import (
    leftovers,
    ports,
)
from launcher.supervision import (
    supervisord as supervisor,
)
from launcher.supervision import (
    worker_command as launch,
)
from launcher.supervision.exit_reason import exit_reason
from launcher.supervision.farm import Farm, Generation
from launcher.supervision.supervisord import Supervisor

SUPERVISOR_SECONDS = 30.0
"""Until supervisord answers; it reads one file and starts nothing heavy."""
CONTROLLER_SECONDS = 60.0
START_GRACE = 60.0
"""Added to the load timeouts of all workers: the deadline of the whole command."""
POLL = 0.2


class UpError(Exception):
    """The farm could not be brought up. Exit code 1."""


@dataclass
class Up:
    """One run of the command."""

    settings: Settings
    state: StateDir
    say: Say
    replace_other: bool = False
    """A running farm of another configuration file may be replaced."""
    child: subprocess.Popen[bytes] | None = None
    """supervisord, where this run started it."""
    farm: Farm | None = None
    """What is being started, as soon as it has processes."""

    def bring_up(self) -> Farm:
        """Start the farm, or have the running one take this configuration; workers may still load.

        Raises ConfigError, DoesNotFit, UpError and what its parts raise.
        """
        running = farms.load(self.state)
        if running is not None and answers(running):
            return self._refresh(running)
        left = leftovers.find(self.state.path)
        try:
            return self._start(running, left)
        except BaseException:
            if self.farm is None and not left:  # nothing runs, so nothing is to be left
                remove_traces(self.state)
            raise

    def _announce(self) -> None:
        file, model = self.settings.config_file, self.settings.model
        source = f"from {file}" if file else "there is no gpufarm.toml here"
        self.say(f"serving {model.name} ({model.target or 'model.command'}), {source}")

    def _start(self, before: Farm | None, left: Sequence[psutil.Process]) -> Farm:
        """Start a farm. ``before``: what was recorded of one that was killed here; ``left``: its
        processes, which serve until everything that could be refused has been looked at."""
        if not self._has_port_already():
            check_port(self.settings)
        self._announce()
        held = _held_by_leftovers(before, left)
        plan = make_plan(self.settings, self.state, self.say, held)
        block = self._ports(self.state.ports(), left)
        self.state.record_ports(block)
        generation = Generation(
            number=1 + max((g.number for g in before.generations), default=0) if before else 1,
            settings=self.settings,
            plan=plan.with_ports(block),
            sources=launch.sources_digest(self.settings),
        )
        self.state.runtime()
        farm = Farm(self.state, generation, block)
        self._keep_desired(before)
        farms.render(farm)
        farms.save_generation(self.state, generation)
        for slot in generation.plan.slots:
            farms.write_launch(farm, generation, slot)
        farms.save(farm)
        if left:
            grace = stop_seconds(before) if before else stop_seconds(farm)
            count = leftovers.clean(self.state.path, grace)
            self.say(f"ended what an earlier farm had left behind ({count} processes)")
        self._spawn(farm)
        return farm

    def _has_port_already(self) -> bool:
        """Whether an nginx that this farm left behind listens on the public port."""
        members = set(nginx_processes.all_members(self.state.path))
        return bool(members) and any(
            connection.pid in members and connection.laddr[1] == self.settings.port
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr
        )

    def _keep_desired(self, before: Farm | None) -> None:
        """What was scaled or drained lasts until `down`; what happened to processes does not.

        A count that the configuration has changed since ``before`` is newer than an old `scale`.
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
                supervisor.command(self.state.path),
                cwd=self.state.path,
                env=supervisor.environment(self.state.path),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        control = Supervisor(farm.socket)
        deadline = time.monotonic() + SUPERVISOR_SECONDS
        while not control.alive():
            if self.child.poll() is not None:
                raise UpError(f"supervisord ended at once: {exit_reason(log)}; see {log}")
            if time.monotonic() > deadline:
                raise UpError(f"supervisord does not answer; see {log}")
            time.sleep(POLL / 4)
        control.hold(farm.ports)

    def _refresh(self, running: Farm) -> Farm:
        """Have a running farm take this configuration, without a gap where that is possible.

        Nothing is applied before the whole change is known to be possible.
        """
        old, new = running.settings, self.settings
        self._check_identity(old)
        if (old.host, old.port) != (new.host, new.port):
            check_port(new, old)
        if new.port in running.ports:
            raise ConfigError(
                f"port = {new.port} is kept for this farm's workers; choose another with --port"
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
            sources=launch.sources_digest(new),
        )
        if generation.sources != running.current.sources and plan is running.plan:
            self.say("the model's files have changed: its workers are replaced")
        if generation.same_as(running.current):
            farm = replace(running, candidate=None)
        else:
            farm = replace(running, candidate=generation, ports=block)
            farms.save_generation(self.state, generation)
            self.state.record_ports(block)
        farms.render(farm, check_only=True)
        follow = _count(old) != _count(new)
        number, base = farm.generations[-1].number, farm.current.number
        # The controller first: it refuses where another command has changed the farm meanwhile.
        view = retried(lambda: Client(farm).roll_out(number, base, follow))
        self.apply(farm)
        self._say_count(view, plan.count)
        return farm

    def _check_identity(self, old: Settings) -> None:
        """Raises ConfigError where the running farm was started from another file."""
        new = self.settings
        same = old.config_file == new.config_file
        if same and (new.config_file or old.model == new.model):
            return
        if self.replace_other:
            return
        files = [str(file) if file else "no file" for file in (old.config_file, new.config_file)]
        raise ConfigError(
            f"the farm that runs in {self.state.path} was started from {files[0]}, and this "
            f"configuration comes from {files[1]}: replace it with --replace, or start a second "
            f"farm with --state-dir"
        )

    def _say_count(self, view: dict[str, Any], configured: int) -> None:
        if view["count_from"] == "scale" and view["count"] != configured:
            self.say(
                f"workers: {view['count']}, as `gpufarm scale` asked; the configuration gives "
                f"{configured}, which `gpufarm scale auto` brings back"
            )

    def apply(self, farm: Farm) -> None:
        """Write what supervisord and nginx read, and let them take it over as they run."""
        changes = farms.render(farm)
        if changes.supervisor:
            control = Supervisor(farm.socket)
            control.update()
            control.hold(farm.ports)
            control.restart("controller")
            self.say("the supervisor has taken over its new file")
        if changes.balancer and nginx_reload.reload(self.state.path):
            self.say("nginx has taken its new configuration")

    def _replan(self, running: Farm) -> Plan:
        """A plan for what a running farm may use: what is free, and what its workers hold."""
        workers = retried(Client(running).workers)["workers"]
        held = held_by(workers, running.plan.footprint)
        return make_plan(self.settings, self.state, self.say, held)

    def _ports(self, recorded: tuple[int, ...], left: Sequence[psutil.Process]) -> tuple[int, ...]:
        """The slots' ports. Those of an earlier farm's leftovers are theirs until they end."""
        size, public = self.settings.workers.max, self.settings.port
        if left and recorded:
            return ports.extend(self.state.path, recorded, size, public=public)
        return ports.choose(self.state.path, size, recorded, public=public)

    def wait_or_end(self, farm: Farm) -> dict[str, Any]:
        """``wait``; a farm that was started here and has nothing to serve is ended again."""
        try:
            return self.wait(farm)
        except UpError as error:
            if self.child is None or serves(farm):
                raise
            with self.state.lock(wait=CONTROLLER_SECONDS):
                shut_down(farm)
                remove_traces(farm.state)
            raise UpError(f"{error}; nothing was left running") from None

    def wait(self, farm: Farm) -> dict[str, Any]:
        """Wait until every worker is ready, reporting what happens. Returns `GET /workers`.

        Raises UpError when a worker is given up, or when the deadline passes.
        """
        client = Client(farm)
        settings = [generation.settings.workers for generation in farm.generations]
        # A worker that is to be replaced may have a request to finish first.
        each = max(one.load_timeout + one.request_timeout for one in settings)
        count = max(generation.plan.capacity for generation in farm.generations)
        deadline = time.monotonic() + CONTROLLER_SECONDS + START_GRACE + max(1, count) * each
        reporter = Reporter(self.say)
        away_since = time.monotonic()
        while time.monotonic() < deadline:
            if self.child is not None and self.child.poll() is not None:
                raise UpError(f"supervisord ended; see {self.state.logs}")
            if self.child is None and not answers(farm) and self.state.farm_file.exists():
                raise UpError("the farm's supervisor has ended; `gpufarm up` brings it back")
            try:
                view = client.workers()
            except AwayError as error:
                if not self.state.farm_file.exists():
                    raise UpError("the farm was stopped by another command") from None
                if time.monotonic() - away_since > CONTROLLER_SECONDS:
                    raise UpError(f"{error}; see {self.state.logs / 'controller.log'}") from None
                time.sleep(POLL)
                continue
            away_since = time.monotonic()
            reporter.report(view)
            if view["settled"]:
                return judged(view, farm.generations[-1].number)
            time.sleep(POLL)
        raise UpError("the workers are not ready in time; see `gpufarm ps` and `gpufarm logs`")

    def finish(self) -> None:
        """After a rollout: nginx and supervisord hold what both generations needed until now."""
        with self.state.lock(wait=CONTROLLER_SECONDS):
            farm = farms.load(self.state)
            if farm is not None and farm.candidate is None:
                self.apply(farm)


def _held_by_leftovers(before: Farm | None, left: Sequence[psutil.Process]) -> Held:
    """What the workers of a farm that was killed hold until they are ended."""
    if before is None:
        return Held({CPU: sum(tree_pss(process.pid) for process in left)})
    device = {slot.id: slot.device_id for slot in before.plan.slots}
    workers = []
    for process in left:
        with suppress(psutil.Error):
            name = process.environ().get(leftovers.NAME_MARK, "")
            if name in device:
                on_cpu = device[name] == CPU
                size = tree_pss(process.pid) if on_cpu else 0
                workers.append({"pid": process.pid, "device": device[name], "memory_bytes": size})
    return held_by(workers, before.plan.footprint)


def _count(settings: Settings) -> object:
    return settings.workers.count


@dataclass
class Reporter:
    """Reports each change of a worker once."""

    say: Say
    states: dict[str, tuple[str, str]] | None = None

    def report(self, view: dict[str, Any]) -> None:
        before = self.states or {}
        for worker in view["workers"]:
            id_, state, error = worker["id"], worker["state"], worker["error"] or ""
            if before.get(id_) == (state, error):
                continue
            if state == "ready" and id_ in before and worker["ready_seconds"] is not None:
                self.say(f"{id_} is ready after {worker['ready_seconds']:.1f} s")
            elif state == "starting" and before.get(id_, ("", ""))[0] != state:
                self.say(f"{id_} is starting on {worker['device']}")
            elif state == "stopped" and error:
                self.say(error)
        self.states = {
            worker["id"]: (worker["state"], worker["error"] or "") for worker in view["workers"]
        }


def judged(view: dict[str, Any], number: int) -> dict[str, Any]:
    """A settled farm's view. Raises UpError where a worker or a rollout was given up, or where
    another generation than ``number`` is current."""
    failed: dict[str, list[str]] = {}
    for worker in view["workers"]:
        if worker["gave_up"] and worker["desired"] and worker["error"]:
            why = worker["error"].removeprefix(worker["id"]).strip()
            failed.setdefault(why, []).append(worker["id"])
    if failed:
        raise UpError("; ".join(f"{', '.join(ids)} {why}" for why, ids in failed.items()))
    if failure := view["generation"]["failure"]:
        raise UpError(f"{failure}; the configuration of before stays in force")
    if view["restart"]["error"]:
        raise UpError(view["restart"]["error"])
    if view["generation"]["current"] != number:
        raise UpError("another command has put another configuration in force meanwhile")
    return view


def retried(ask: Callable[[], dict[str, Any]], seconds: float = CONTROLLER_SECONDS) -> Any:
    """Ask a controller that may just be starting again."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return ask()
        except AwayError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL)
