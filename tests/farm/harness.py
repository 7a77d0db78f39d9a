"""A farm as its user has it: a folder with a gpufarm.toml, the command, and requests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from launcher.supervision.unix_http import UnixConnection
from tests.steady import Load, steady
from tests.waiting import free_port, until

STANDIN = Path(__file__).parent.parent / "standin.py"
REPOSITORY = STANDIN.parent.parent
COMMAND_SECONDS = 120


@dataclass
class FarmUnderTest:
    """One farm in a folder of its own."""

    folder: Path
    port: int
    command_prefix: tuple[str, ...] = ()
    interpreter: str = sys.executable
    more_environment: dict[str, str] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("GPUFARM_")}
        home = str(self.folder.parent / "home")
        return kept | {
            "XDG_STATE_HOME": home,
            "HOME": home,
            # The models of these tests run on a CPU, whatever else the machine has.
            "CUDA_VISIBLE_DEVICES": "",
            **self.more_environment,
        }

    def configure(self, text: str) -> None:
        (self.folder / "gpufarm.toml").write_text(text)

    def command(self, *arguments: str) -> list[str]:
        return self.python("-P", "-m", "launcher.cli", *arguments)

    def python(self, *arguments: str) -> list[str]:
        return [*self.command_prefix, self.interpreter, *arguments]

    def run(self, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        message = f"{arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        assert done.returncode == expect, f"{message}\n{self.logs()}"
        assert "Traceback" not in done.stderr, message
        return done

    def logs(self) -> str:
        """The end of every log, for a failure's message."""
        parts = []
        for path in sorted((self.state / "logs").glob("*.log")):
            parts.append(f"--- {path.name}\n" + "\n".join(path.read_text().splitlines()[-15:]))
        return "\n".join(parts)

    def ps(self) -> dict[str, Any]:
        view: dict[str, Any] = json.loads(self.run("ps", "--json").stdout)
        return view

    def admin(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """Ask the controller on its socket."""
        connection = UnixConnection(self.runtime / "admin.sock", timeout=30)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return httpx.Response(answer.status, content=answer.read())
        finally:
            connection.close()

    @property
    def runtime(self) -> Path:
        return Path((self.state / "runtime").read_text().strip())

    def generation(self) -> dict[str, Any]:
        """The configuration and plan that hold."""
        number = json.loads((self.state / "farm.json").read_text())["current"]
        found: dict[str, Any] = json.loads((self.state / f"generations/{number}.json").read_text())
        return found

    def workers(self) -> dict[str, dict[str, Any]]:
        """By id, straight from the controller."""
        return {worker["id"]: worker for worker in self.admin("GET", "/workers").json()["workers"]}

    def pids(self) -> dict[str, int]:
        return {id_: worker["pid"] for id_, worker in self.workers().items() if worker["pid"]}

    def states(self) -> dict[str, str]:
        return {id_: worker["state"] for id_, worker in self.workers().items()}

    def wait_for(self, **states: str) -> None:
        until(lambda: states.items() <= self.states().items(), f"{states} of {self.folder}")

    def pid_of(self, module: str) -> int:
        """The controller's or supervisord's process; 0 while there is none."""
        found = [
            process.pid
            for process in psutil.process_iter(["cmdline"])
            if module in (process.info["cmdline"] or [])
            and any(str(self.state) in part for part in process.info["cmdline"])
        ]
        assert len(found) <= 1, found
        return found[0] if found else 0

    def wait_for_another_controller(self, old: int) -> None:
        """Until the successor of a killed controller has looked around."""
        until(lambda: self.pid_of("launcher.controller") not in (0, old), "a new controller")
        until(lambda: self.admin("GET", "/workers").json()["settled"], "it has looked around")

    def load(
        self, path: str = "/work?seconds=0.02", clients: int = 4, body: bytes = b"{}"
    ) -> AbstractContextManager[Load]:
        """Requests, one after another from each client, while the block runs."""
        return steady(self.url, path, body, clients)

    def processes(self) -> list[psutil.Process]:
        """Everything that belongs to this farm's state directory, by any mark."""
        found = []
        for process in psutil.process_iter():
            try:
                marks = [*process.cmdline(), process.environ().get("GPUFARM_FARM", "")]
                marks += [file.path for file in process.open_files()]
            except (psutil.Error, OSError):
                continue
            if process.pid != os.getpid() and any(str(self.state) in mark for mark in marks):
                found.append(process)
        return found

    def sockets(self) -> list[Path]:
        return [path for path in self.state.rglob("*") if path.is_socket()]

    def end(self) -> None:
        """Whatever happened, leave nothing."""
        subprocess.run(
            self.command("down"),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        for process in self.processes():
            process.kill()


def external_server(
    port: int, more: str = "", workers: str = "", options: tuple[str, ...] = ()
) -> str:
    """Return a gpufarm.toml whose workers are the external server of tests/standin.py."""
    command = [sys.executable, str(STANDIN), "--port", "{port}", "--id", "{id}", *options]
    return f"""
port = {port}
state_dir = "state"
[model]
name = "standin"
command = {json.dumps(command)}
ready_url = "/v1/health"
[workers]
max = 4
request_timeout = 15
load_timeout = 30
{workers}
[footprint]
bytes = "64MiB"
[budget]
ram = "8GiB"
{more}
"""


@contextmanager
def new_farm(text: str = "", workers: str = "count = 2", **options: Any) -> Iterator[FarmUnderTest]:
    """A farm that has not been brought up; ended and removed afterwards."""
    base = Path(tempfile.mkdtemp(prefix="gpufarm-test-"))
    folder = base / "farm"
    folder.mkdir()
    farm = FarmUnderTest(folder, free_port())
    farm.configure(text or external_server(farm.port, workers=workers, **options))
    try:
        yield farm
    finally:
        farm.end()
        shutil.rmtree(base, ignore_errors=True)


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def within(seconds: float, begun: float) -> bool:
    return time.monotonic() - begun < seconds
