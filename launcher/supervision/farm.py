"""A farm on disk: its generations of configuration, and the files that start its processes.

A generation is one complete configuration with its plan. `up` writes one; it is a candidate until
the workers run with it, and then becomes current. A candidate that cannot be rolled out is dropped,
and the current generation stays in force.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from balancer import configuration, nginx
from balancer.configuration import BalancerConfig, Upstream
from launcher.config.settings import Settings
from launcher.config.state import StateDir, read_json, write_json, write_text
from launcher.planning.plan import Plan, Slot
from launcher.supervision import supervisord as supervisor
from launcher.supervision import worker_command as launch
from launcher.supervision.supervisord import SupervisorConfig, python_module

ADMIN_SOCKET = "admin.sock"
LOST_CANDIDATE = (
    "the configuration that was being rolled out cannot be read; run `gpufarm up` again"
)


@dataclass(frozen=True)
class Generation:
    """One configuration with its plan."""

    number: int
    settings: Settings
    plan: Plan
    """With ports."""
    sources: str
    """Digest of the model's source at `up`."""

    def same_as(self, other: Generation) -> bool:
        """Return whether both are equal except for their number."""
        return replace(self, number=other.number) == other

    @property
    def is_external(self) -> bool:
        """Whether the workers are external servers (model.command)."""
        return bool(self.settings.model.command)

    @cached_property
    def _digests(self) -> dict[str, str]:
        cache = StateDir(self.settings.state_dir).cache
        return {
            row.id: launch.digest(self.settings, row.device, self.sources, cache)
            for row in self.plan.devices
        }

    def spec_of(self, slot: Slot) -> str:
        """Return a digest of everything that starts the slot's worker except its port."""
        return self._digests[slot.device_id]

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": self.settings.to_json(),
            "plan": self.plan.to_json(),
            "sources": self.sources,
        }


@dataclass(frozen=True)
class Farm:
    """The recorded state of a running farm."""

    state: StateDir
    current: Generation
    ports: tuple[int, ...]
    """One port for each slot, in order; there may be more ports than slots in the plan."""
    candidate: Generation | None = None
    """The generation that is being rolled out."""
    failure: str = ""
    """Why the last candidate was dropped; empty if it was not."""

    @property
    def settings(self) -> Settings:
        return self.current.settings

    @property
    def plan(self) -> Plan:
        return self.current.plan

    @property
    def generations(self) -> tuple[Generation, ...]:
        return (self.current, self.candidate) if self.candidate else (self.current,)

    @cached_property
    def runtime(self) -> Path:
        """The directory of the sockets."""
        return self.state.recorded_runtime() or self.state.path / "run"

    @property
    def socket(self) -> Path:
        """The socket of supervisord."""
        return self.runtime / supervisor.SOCKET

    @property
    def admin_socket(self) -> Path:
        """The socket of the controller's admin interface."""
        return self.runtime / ADMIN_SOCKET

    @property
    def is_external(self) -> bool:
        return self.current.is_external

    @property
    def url(self) -> str:
        """The public URL, for clients on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "::": "::1"}.get(  # noqa: S104
            self.settings.host, self.settings.host
        )
        return f"http://{configuration.address(host, self.settings.port)}"

    def port_of(self, id_: str) -> int:
        """Return the port of a slot such as w3. Raises IndexError for a slot without one."""
        return self.ports[int(id_[1:]) - 1]

    def promoted(self) -> Farm:
        """Return the farm with its candidate as the current generation."""
        return replace(self, current=self.candidate or self.current, candidate=None, failure="")

    def abandoned(self, failure: str) -> Farm:
        """Return the farm without its candidate."""
        return replace(self, candidate=None, failure=failure)


@dataclass(frozen=True)
class Changes:
    """Which files a rendering changed."""

    balancer: bool
    supervisor: bool


def load(state: StateDir) -> Farm | None:
    """Load the farm that runs in this state directory.

    None if there is none, or if its records are invalid: a crash or another version wrote them.
    """
    record = read_json(state.farm_file)
    if not isinstance(record, dict):
        return None
    try:
        current = load_generation(state, int(record["current"]))
        if current is None:
            return None
        number = record["candidate"]
        candidate = load_generation(state, int(number)) if number is not None else None
        lost = number is not None and candidate is None
        return Farm(
            state=state,
            current=current,
            ports=tuple(map(int, record["ports"])),
            candidate=candidate,
            failure=LOST_CANDIDATE if lost else str(record["failure"]),
        )
    except (KeyError, TypeError, ValueError):
        return None


def load_generation(state: StateDir, number: int) -> Generation | None:
    """Load a generation; None if it does not exist or is invalid."""
    data = read_json(_file(state, number))
    if not isinstance(data, dict):
        return None
    try:
        settings, plan = Settings.from_json(data["settings"]), Plan.from_json(data["plan"])
        return Generation(number, settings, plan, str(data["sources"]))
    except (KeyError, TypeError, ValueError):
        return None


def save_generation(state: StateDir, generation: Generation) -> None:
    write_json(_file(state, generation.number), generation.to_json())


def save(farm: Farm) -> None:
    """Record which generations are in use, and delete the files of older ones."""
    numbers = {generation.number for generation in farm.generations}
    write_json(
        farm.state.farm_file,
        {
            "url": farm.url,
            "current": farm.current.number,
            "candidate": farm.candidate.number if farm.candidate else None,
            "failure": farm.failure,
            "ports": list(farm.ports),
        },
    )
    for path in farm.state.generations.glob("*.json"):
        if path.stem.isdecimal() and int(path.stem) < min(numbers):
            path.unlink(missing_ok=True)


def _file(state: StateDir, number: int) -> Path:
    return state.generations / f"{number}.json"


def write_launch(farm: Farm, generation: Generation, slot: Slot) -> None:
    """Write the file that starts the slot's worker.

    An unchanged file is not written again, so that a full disk stops no replacement.
    """
    state, settings = farm.state, generation.settings
    spec = Path()
    if not generation.is_external:
        text = json.dumps(launch.worker_spec(settings, state.cache), indent=2, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        spec = state.specs / f"{name}.json"
        _write_if_changed(spec, text)
    start = launch.launch(
        settings,
        generation.plan.device_of(slot),
        id=slot.id,
        port=farm.port_of(slot.id),
        spec=spec,
        cache=state.cache,
    )
    _write_if_changed(state.slots / f"{slot.id}.json", json.dumps(asdict(start), indent=2))


def _write_if_changed(path: Path, text: str) -> bool:
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(mode=0o700, exist_ok=True)
    write_text(path, text)
    return True


def balancer_config(farm: Farm, version: tuple[int, ...]) -> BalancerConfig:
    """Describe nginx's configuration.

    During a rollout it has the candidate's address and the longer of both timeouts.
    """
    settings = farm.generations[-1].settings
    external = any(generation.is_external for generation in farm.generations)
    return BalancerConfig(
        host=settings.host,
        port=settings.port,
        # Every port of the farm, also without a slot: another plan changes nothing here.
        upstreams=tuple(Upstream(f"w{n}", port) for n, port in enumerate(farm.ports, 1)),
        admin_socket=farm.admin_socket,
        prefix=farm.state.path,
        version=version,
        body_limit=max(g.settings.balancer.body_limit for g in farm.generations),
        request_timeout=_longest_request(farm),
        processes=min(4, os.cpu_count() or 1),
        open_files=configuration.open_file_limit(),
        as_root=os.geteuid() == 0,
        own_workers=not external,
    )


def _longest_request(farm: Farm) -> float:
    """Return the longest request timeout in seconds."""
    return max(generation.settings.workers.request_timeout for generation in farm.generations)


def supervisor_config(farm: Farm, program: Path) -> SupervisorConfig:
    settings = farm.generations[-1].settings
    start = python_module(
        "balancer.start", "--program", str(program), "--prefix", str(farm.state.path)
    )
    return SupervisorConfig(
        state=farm.state.path,
        socket=farm.socket,
        slots=len(farm.ports),
        request_timeout=_longest_request(farm),
        nginx_command=start,
        stop_whole_group=any(generation.is_external for generation in farm.generations),
        log_bytes=settings.logs.max_bytes,
        log_backups=settings.logs.backups,
    )


def render(farm: Farm, *, check_only: bool = False) -> Changes:
    """Write every file that the processes are started from, and let nginx check its own.

    ``check_only``: replace nothing that is in use. Raises BalancerError where nginx is missing or
    refuses.
    """
    state = farm.state
    program = nginx.find()
    version = nginx.version(program)
    text = supervisor.render(supervisor_config(farm, program))
    # Every check comes before the first change: a running farm restarts from these files.
    changed_balancer = configuration.write(
        balancer_config(farm, version),
        lambda name: nginx.test(program, version, state.path, name),
        check_only=check_only,
    )
    file = state.path / supervisor.CONF
    changed = not file.exists() or file.read_text(encoding="utf-8") != text
    if changed and not check_only:
        write_text(file, text)
    return Changes(changed_balancer, changed)
