"""A compose project on the engine that is there: its farm as its operator has it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.repository import REPOSITORY
from tests.waiting import free_port, until

FARMS = Path(__file__).parent / "farms"
COMMAND_SECONDS = 300
READY_SECONDS = 120
OURS = {"COMPOSE_PROFILES": ""}
"""The profile is given to the tool, so that it builds every image; a scene names its own."""


@dataclass
class Project:
    """One project; the files are this repository's, and perhaps one that changes them."""

    name: str
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)
    override: Path | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def compose(self, *arguments: str, expect: int | None = 0) -> str:
        """Run docker-compose; both its outputs. ``expect`` None: any exit code will do."""
        files = ["-f", str(REPOSITORY / "docker-compose.yml")]
        files += ["-f", str(self.override)] if self.override else []
        done = subprocess.run(
            ["docker-compose", "-p", self.name, *files, *arguments],
            cwd=REPOSITORY,
            env=os.environ | OURS | {"GPUFARM_PORT": str(self.port)} | dict(self.environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        output = done.stdout + done.stderr
        assert expect is None or done.returncode == expect, f"{arguments}: {output}\n{self.tail()}"
        return output

    def tail(self) -> str:
        """The end of the farm's log, for a failure's message."""
        return "\n".join(self.logs("--tail", "40"))

    def up(self, *more: str) -> None:
        """`up`, as an operator types it, without building; returns when the farm is healthy."""
        wait = ("--wait", "--wait-timeout", str(READY_SECONDS))
        self.compose("up", "-d", "--no-build", "--pull", "never", *wait, *more)

    def gpufarm(self, *arguments: str, expect: int = 0) -> str:
        """The command inside of the container."""
        return self.inside("gpufarm", *arguments, expect=expect)

    def inside(self, *command: str, expect: int = 0) -> str:
        return self.compose("exec", "-T", "farm", *command, expect=expect)

    def workers(self) -> dict[str, dict[str, Any]]:
        """`ps --json` by the workers' ids."""
        view = json.loads(self.gpufarm("ps", "--json"))
        return {worker["id"]: worker for worker in view["workers"]}

    def container(self, service: str = "farm") -> str:
        """The container's name, by compose's own rule."""
        return f"{self.name}-{service}-1"

    def inspect(self) -> dict[str, Any]:
        done = subprocess.run(
            ["docker", "inspect", self.container()],
            capture_output=True,
            timeout=COMMAND_SECONDS,
            check=True,
        )
        (found,) = json.loads(done.stdout)
        return dict(found)

    def logs(self, *options: str) -> list[str]:
        """Every line of every start of the container that is there; none where there is none."""
        done = subprocess.run(
            ["docker", "logs", *options, self.container()],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        return done.stdout.splitlines()

    def seconds_to_ready(self) -> float:
        """From the container's last start until it said that its workers are ready."""
        started = datetime.fromisoformat(self.inspect()["State"]["StartedAt"])

        def ready() -> list[datetime]:
            lines = self.logs("-t")
            ready = [line.split()[0] for line in lines if " ready at http" in line]
            times = [datetime.fromisoformat(time) for time in ready]
            return [time for time in times if time > started]

        return (until(ready, "every worker is ready")[0] - started).total_seconds()

    def wait_until_given_up(self) -> dict[str, Any]:
        """The container, once the engine does not start it again."""
        until(lambda: self.inspect()["State"]["Status"] in ("exited", "dead"), "it is given up")
        return self.inspect()


@contextmanager
def project(
    name: str, farm: Path | None = None, override: Path | None = None, **environment: str
) -> Iterator[Project]:
    """A project of its own beside the first one; nothing of it is left afterwards."""
    given = environment | ({"FARM": str(farm)} if farm else {})
    made = Project(f"gpufarm-{name}", free_port(), given, override)
    try:
        yield made
    finally:
        made.compose("down", "-v", "--remove-orphans", "-t", "10", expect=None)


def the_farm() -> Project:
    """The one that the tool has brought up, as `docker-compose up` does."""
    return Project("gpufarm", 8000)
