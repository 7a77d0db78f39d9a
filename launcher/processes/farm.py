"""A farm on disk: what `up` settled, and the files that its processes are started from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from balancer import configuration, nginx
from balancer.configuration import BalancerConfig, Upstream
from launcher.configuration.config import Settings
from launcher.configuration.state import StateDir, read_json, write_json, write_text
from launcher.planning.plan import Plan
from launcher.processes import launch, supervisor
from launcher.processes.supervisor import SupervisorConfig, python_module

FARM_FILE = "farm.json"
"""There from `up` to `down`."""


@dataclass(frozen=True)
class Farm:
    """Everything that is fixed while a farm runs."""

    state: StateDir
    settings: Settings
    plan: Plan
    """With ports."""
    admin_port: int
    socket: Path
    """supervisord's."""

    @property
    def url(self) -> str:
        """The public address, as somebody on this machine would call it."""
        host = {"0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "::": "::1"}.get(  # noqa: S104
            self.settings.host, self.settings.host
        )
        return f"http://{configuration.address(host, self.settings.port)}"

    @property
    def foreign(self) -> bool:
        """Whether the workers are somebody else's server."""
        return bool(self.settings.model.command)

    @property
    def digest(self) -> str:
        """Of what its workers serve."""
        return launch.digest(self.settings, self.state.cache)

    def to_json(self) -> dict[str, Any]:
        return {"url": self.url, "admin_port": self.admin_port, "socket": str(self.socket)}


@dataclass(frozen=True)
class Changes:
    """What a rendering changed."""

    balancer: bool
    supervisor: bool


def load(state: StateDir) -> Farm | None:
    """The farm that was last brought up in this state directory and not taken down since.

    None as well where its records cannot be understood: a crash or another version wrote them.
    """
    record = read_json(state.path / FARM_FILE)
    settings, plan = read_json(state.settings_file), read_json(state.plan_file)
    if not record or not settings or not plan:
        return None
    try:
        return Farm(
            state=state,
            settings=Settings.from_json(settings),
            plan=Plan.from_json(plan),
            admin_port=int(record["admin_port"]),
            socket=Path(record["socket"]),
        )
    except (KeyError, TypeError, ValueError):
        return None


def save(farm: Farm) -> None:
    """Record it, the marker of a farm last."""
    write_json(farm.state.settings_file, farm.settings.to_json())
    write_json(farm.state.plan_file, farm.plan.to_json())
    write_json(farm.state.path / FARM_FILE, farm.to_json())


def balancer_config(farm: Farm, version: tuple[int, ...]) -> BalancerConfig:
    settings = farm.settings
    return BalancerConfig(
        host=settings.host,
        port=settings.port,
        upstreams=tuple(Upstream(slot.id, slot.port) for slot in farm.plan.slots),
        admin_port=farm.admin_port,
        prefix=farm.state.path,
        version=version,
        body_limit=settings.balancer.body_limit,
        request_timeout=settings.workers.request_timeout,
        processes=min(4, os.cpu_count() or 1),
        open_files=configuration.open_file_limit(),
        as_root=os.geteuid() == 0,
        own_workers=not farm.foreign,
    )


def supervisor_config(farm: Farm, program: Path) -> SupervisorConfig:
    settings = farm.settings
    start = python_module(
        "balancer.start", "--program", str(program), "--prefix", str(farm.state.path)
    )
    return SupervisorConfig(
        state=farm.state.path,
        socket=farm.socket,
        slots=settings.workers.max,
        request_timeout=settings.workers.request_timeout,
        nginx_command=start,
        stop_whole_group=farm.foreign,
        log_bytes=settings.logs.max_bytes,
        log_backups=settings.logs.backups,
    )


def render(farm: Farm) -> Changes:
    """Write every file that the processes are started from, and let nginx check its own.

    Raises BalancerError where nginx is missing or refuses.
    """
    state = farm.state
    program = nginx.find()
    version = nginx.version(program)
    text = supervisor.render(supervisor_config(farm, program))
    # Whatever is refused is refused before a file has changed: a running farm lives on from them.
    changed_balancer = configuration.write(
        balancer_config(farm, version),
        lambda name: nginx.test(program, version, state.path, name),
    )
    write_json(state.path / launch.WORKER_SPEC, launch.worker_spec(farm.settings, state.cache))
    write_json(
        state.path / launch.LAUNCHES,
        launch.launches(farm.settings, farm.plan, state.path, state.cache),
    )
    file = state.path / supervisor.CONF
    changed_supervisor = not file.exists() or file.read_text() != text
    if changed_supervisor:
        write_text(file, text)
    return Changes(changed_balancer, changed_supervisor)
