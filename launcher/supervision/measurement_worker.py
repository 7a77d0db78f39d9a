"""Start one worker as a child process, to measure its footprint without a supervisor."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from launcher.config.settings import Settings
from launcher.config.state import StateDir, write_json
from launcher.planning.inventory import Device
from launcher.supervision import supervisord as supervisor
from launcher.supervision.exit_reason import exit_reason
from launcher.supervision.supervisord import python_module
from launcher.supervision.worker_command import launch, worker_spec

MEASUREMENT_SPEC = "measure-worker.json"
"""File with the worker's spec; it exists during the measurement."""


class MeasurementWorker:
    """A child process in a session of its own. ``start`` starts it; ``stop`` ends the session.

    ``spec``: a file that only this worker reads; ``stop`` deletes it.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        *,
        port: int,
        ready_path: str,
        log: Path,
        grace: float,
        spec: Path | None,
    ) -> None:
        self._process = process
        self._log = log
        self._grace = grace
        self._spec = spec
        self.pid = process.pid
        self.host = "127.0.0.1"
        self.port = port
        self.ready_path = ready_path

    @classmethod
    def start(
        cls,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        folder: Path,
        port: int,
        ready_path: str,
        log: Path,
        grace: float = 10.0,
        spec: Path | None = None,
    ) -> MeasurementWorker:
        """Start a command with exactly ``environment``. ``grace``: seconds from SIGTERM to SIGKILL.

        Raises OSError when the command cannot be executed.
        """
        with log.open("wb") as output:
            process = subprocess.Popen(
                list(argv),
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return cls(process, port=port, ready_path=ready_path, log=log, grace=grace, spec=spec)

    def exit_code(self) -> int | None:
        """Return its exit code, None while it runs; a signal is negative.

        It is not reaped, so that its process group's id stays reserved.
        """
        if self._process.returncode is not None:
            return self._process.returncode
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def exit_reason(self) -> str:
        """Return the last line of its log; empty when there is none."""
        return exit_reason(self._log)

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL to the whole group after the grace, children included."""
        if self._process.returncode is not None:
            return
        if self._spec is not None:
            self._spec.unlink(missing_ok=True)
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + self._grace
        while self.exit_code() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        self._signal(signal.SIGKILL)
        self._process.wait()
        while self._group_exists() and time.monotonic() < deadline:
            time.sleep(0.02)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _group_exists(self) -> bool:
        try:
            os.killpg(self.pid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True


def measurement_start(settings: Settings, state: StateDir) -> Callable[[Device], MeasurementWorker]:
    """Return a function that starts the configured worker on a free port.

    It logs to logs/measure.log and carries the farm's mark; on Linux it ends when this process
    does, even by SIGKILL.
    """
    die_with_parent = python_module("launcher.supervision.die_with_parent", str(os.getpid()))

    def start(device: Device) -> MeasurementWorker:
        state.create()
        spec = state.path / MEASUREMENT_SPEC
        write_json(spec, worker_spec(settings, state.cache))
        port = free_port()
        begin = launch(settings, device, id="w0", port=port, spec=spec, cache=state.cache)
        try:
            return MeasurementWorker.start(
                [*die_with_parent, *begin.argv],
                environment={**supervisor.environment(state.path), **begin.environment},
                folder=Path(begin.folder),
                port=port,
                ready_path=settings.model.ready_url if settings.model.command else "/readyz",
                log=state.logs / "measure.log",
                spec=spec,
            )
        except OSError:
            spec.unlink(missing_ok=True)
            raise

    return start


def free_port() -> int:
    """Return a free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
