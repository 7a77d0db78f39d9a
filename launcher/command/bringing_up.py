"""`gpufarm up`: from a configuration to a farm whose every worker is ready."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from balancer import reload as nginx_reload
from launcher.command.bringing_down import (
    end_leftovers,
    end_unrecorded,
    remove_traces,
    shut_down,
)
from launcher.command.client import AwayError, Client, serves
from launcher.command.settling import Say, check_port, make_plan
from launcher.configuration.config import ConfigError, Settings
from launcher.configuration.state import StateDir, read_json, write_json
from launcher.planning.plan import Plan
from launcher.processes import farm as farms
from launcher.processes import ports, supervisor
from launcher.processes.farm import Farm
from launcher.processes.last_words import last_line
from launcher.processes.supervisor import Supervisor

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
    count: int | None
    """Asked for on the command line; None: keep what a running farm has."""
    say: Say
    child: subprocess.Popen[bytes] | None = None
    """supervisord, where this run started it."""
    farm: Farm | None = None
    """What is being started, as soon as it has processes."""

    def bring_up(self) -> Farm:
        """Start the farm, or bring the running one to the configuration; workers may still load.

        Raises ConfigError, DoesNotFit, UpError and what its parts raise.
        """
        running = farms.load(self.state)
        if running is not None and Supervisor(running.socket).alive():
            return self._refresh(running)
        self._clean(running)
        try:
            return self._start(running.settings if running else None)
        except BaseException:
            if self.farm is None:  # nothing runs, so nothing is to be left
                remove_traces(self.state)
            raise

    def _tell_what(self) -> None:
        file, model = self.settings.config_file, self.settings.model
        told = f"as {file} says" if file else "there is no gpufarm.toml here"
        self.say(f"serving {model.name} ({model.target or 'model.command'}), {told}")

    def _clean(self, running: Farm | None) -> None:
        """End what a killed supervisor has left, or a farm whose records were lost."""
        if running is None:
            count = end_unrecorded(self.state)
        else:
            count = end_leftovers(self.state, running.settings.workers.request_timeout)
        if count:
            self.say(f"ended what an earlier farm had left behind ({count} processes)")

    def _start(self, before: Settings | None) -> Farm:
        """``before``: the settings of a farm that was killed here."""
        check_port(self.settings)
        self._tell_what()
        plan = make_plan(self.settings, self.state, self.say)
        block = self._ports(self.state.ports())
        self.state.record_ports(block)
        farm = Farm(
            state=self.state,
            settings=self.settings,
            plan=plan.with_ports(block[1:]),
            admin_port=block[0],
            socket=self.state.runtime() / supervisor.SOCKET,
        )
        self._keep_wishes(plan, before)
        farms.render(farm)
        farms.save(farm)
        self._spawn(farm)
        return farm

    def _keep_wishes(self, plan: Plan, before: Settings | None) -> None:
        """What was scaled or drained lasts until `down`; what happened to processes does not.

        A count that the configuration has changed since ``before`` is the newer wish.
        """
        wishes = read_json(self.state.desired_file)
        if self.count is not None or not isinstance(wishes, dict):
            self.state.desired_file.unlink(missing_ok=True)
            return
        ids = {slot.id for slot in plan.slots}
        count, drained = wishes.get("count"), wishes.get("drained")
        if before is not None and before.workers.count != self.settings.workers.count:
            count = plan.count
        kept = {
            "count": min(count if isinstance(count, int) else plan.count, plan.capacity),
            "drained": [id_ for id_ in drained if id_ in ids] if isinstance(drained, list) else [],
        }
        write_json(self.state.desired_file, kept)

    def _spawn(self, farm: Farm) -> None:
        self.farm = farm
        log = self.state.logs / "supervisord.out.log"
        with log.open("ab") as output:
            self.child = subprocess.Popen(
                supervisor.command(self.state.path),
                cwd=self.state.path,
                env=supervisor.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        control = Supervisor(farm.socket)
        deadline = time.monotonic() + SUPERVISOR_SECONDS
        while not control.alive():
            if self.child.poll() is not None:
                raise UpError(f"supervisord ended at once: {last_line(log)}; see {log}")
            if time.monotonic() > deadline:
                raise UpError(f"supervisord does not answer; see {log}")
            time.sleep(POLL / 4)

    def _refresh(self, running: Farm) -> Farm:
        """Bring a running farm to the configuration, without a gap where that is possible."""
        old, new = running.settings, self.settings
        if old.config_file and not new.config_file and old.model != new.model:
            raise ConfigError(
                f"the farm that runs was started from {old.config_file}, and there is no such file "
                f"here: name it with --config, or end that farm with `gpufarm down` first"
            )
        if (old.host, old.port) != (new.host, new.port):
            check_port(new, old)
        if new.port in self.state.ports():
            raise ConfigError(
                f"port = {new.port} is kept for this farm's workers; choose another with --port"
            )
        self._tell_what()
        plan, admin_port = running.plan, running.admin_port
        if old.planned_from != new.planned_from:
            plan, admin_port = self._replan(running)
        farm = replace(running, settings=new, plan=plan, admin_port=admin_port)
        changes = farms.render(farm)
        farms.save(farm)
        if changes.supervisor:
            self.say("the supervisor's file has changed: the farm is started anew")
            shut_down(running)
            self._keep_wishes(plan, old)
            self._spawn(farm)
            return farm
        if changes.balancer and nginx_reload.reload(self.state.path):
            self.say("nginx has taken its new configuration")
        client = Client(farm)
        retried(client.reload)
        count = self.count
        if count is None and old.workers.count != new.workers.count:
            count = plan.count
        if count is not None:
            for warning in client.scale(count).get("warnings", []):
                self.say(f"warning: {warning}")
        return farm

    def _replan(self, running: Farm) -> tuple[Plan, int]:
        """A plan for what a running farm may use: what is free, and what its workers hold.

        With it the controller's port: a larger `workers.max` may need another block, and then the
        supervisor's file changes as well and everything is started anew.
        """
        held: Counter[str] = Counter()
        for worker in retried(Client(running).workers)["workers"]:
            # Where the driver does not tell whose memory it is, a worker has what was measured.
            expected = running.plan.footprint.steady if worker["pid"] else 0
            held[worker["device"]] += worker["memory_bytes"] or expected
        plan = make_plan(self.settings, self.state, self.say, held)
        block = self.state.ports()
        if self.settings.workers.max >= len(block):
            block = self._ports()
            self.state.record_ports(block)
        return plan.with_ports(block[1:]), block[0]

    def _ports(self, recorded: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The controller's port and the slots'."""
        settings = self.settings
        size, public = settings.workers.max + 1, settings.port
        return ports.choose(self.state.path, size, recorded, public=public)

    def wait_or_end(self, farm: Farm) -> dict[str, Any]:
        """``wait``; a farm that was started here and has nothing to serve is ended again."""
        try:
            return self.wait(farm)
        except UpError as error:
            if self.child is None or serves(farm):
                raise
            shut_down(farm)
            remove_traces(farm.state)
            raise UpError(f"{error}; nothing was left running") from None

    def wait(self, farm: Farm) -> dict[str, Any]:
        """Wait until every worker is ready, telling what happens. Returns `GET /workers`.

        Raises UpError when a worker is given up, or when the deadline passes.
        """
        client = Client(farm)
        wanted = max(1, farm.plan.count, self.count or 0)
        # A worker that is to be replaced may have a request to finish first.
        each = self.settings.workers.load_timeout + self.settings.workers.request_timeout
        deadline = time.monotonic() + CONTROLLER_SECONDS + START_GRACE + wanted * each
        told = Teller(self.say)
        away_since = time.monotonic()
        while time.monotonic() < deadline:
            if self.child is not None and self.child.poll() is not None:
                raise UpError(f"supervisord ended; see {self.state.logs}")
            try:
                view = client.workers()
            except AwayError as error:
                if time.monotonic() - away_since > CONTROLLER_SECONDS:
                    raise UpError(f"{error}; see {self.state.logs / 'controller.log'}") from None
                time.sleep(POLL)
                continue
            away_since = time.monotonic()
            told.tell(view)
            if view["settled"]:
                return judged(view)
            time.sleep(POLL)
        raise UpError("the workers are not ready in time; see `gpufarm ps` and `gpufarm logs`")


@dataclass
class Teller:
    """Tells each change of a worker once."""

    say: Say
    states: dict[str, str] | None = None

    def tell(self, view: dict[str, Any]) -> None:
        before = self.states or {}
        for worker in view["workers"]:
            id_, state = worker["id"], worker["state"]
            if before.get(id_) == state:
                continue
            if state == "ready" and id_ in before and worker["ready_seconds"] is not None:
                self.say(f"{id_} is ready after {worker['ready_seconds']:.1f} s")
            elif state == "starting":
                self.say(f"{id_} is starting on {worker['device']}")
            elif state == "stopped" and worker["error"]:
                self.say(f"{worker['error']}")
        self.states = {worker["id"]: worker["state"] for worker in view["workers"]}


def judged(view: dict[str, Any]) -> dict[str, Any]:
    """A settled farm's view. Raises UpError where a worker or a restart was given up."""
    failed: dict[str, list[str]] = {}
    for worker in view["workers"]:
        if worker["state"] == "failed" and worker["wanted"]:
            why = worker["error"].removeprefix(worker["id"]).strip()
            failed.setdefault(why, []).append(worker["id"])
    if failed:
        raise UpError("; ".join(f"{', '.join(ids)} {why}" for why, ids in failed.items()))
    if view["restart"]["error"]:
        raise UpError(view["restart"]["error"])
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
