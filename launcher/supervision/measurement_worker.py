"""One worker as a plain child process: what measuring starts where no supervisor runs yet."""

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
"""What the worker that is measured is told to serve; there while it is measured."""


class MeasurementWorker:
    """A child in a session of its own. Started by ``start``; ``stop`` ends all of the session.

    ``spec``: the file that only this worker reads; it goes with it.
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
        """``environment`` is all that it gets. ``grace``: seconds from TERM to KILL.

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
        """Without reaping it: while its entry stays, its group's number is nobody else's."""
        if self._process.returncode is not None:
            return self._process.returncode
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def exit_reason(self) -> str:
        return exit_reason(self._log)

    def stop(self) -> None:
        """TERM, and KILL for the whole session after the grace; children must not outlive it."""
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
        while self._group_lives() and time.monotonic() < deadline:
            time.sleep(0.02)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _group_lives(self) -> bool:
        try:
            os.killpg(self.pid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True


def measurement_start(settings: Settings, state: StateDir) -> Callable[[Device], MeasurementWorker]:
    """Start the configured worker on a free port, its log in logs/measure.log.

    It bears the farm's mark, and on Linux it ends with this process, however that ends.
    """
    tether = python_module("launcher.supervision.die_with_parent", str(os.getpid()))

    def start(device: Device) -> MeasurementWorker:
        state.create()
        spec = state.path / MEASUREMENT_SPEC
        write_json(spec, worker_spec(settings, state.cache))
        port = free_port()
        begin = launch(settings, device, id="w0", port=port, spec=spec, cache=state.cache)
        try:
            return MeasurementWorker.start(
                [*tether, *begin.argv],
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
    """A port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
