"""After the start of a farm: wait until its workers are ready, or serve in the foreground."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from launcher.cli.client import (
    Client,
    ControllerUnavailableError,
    may_serve,
    supervisor_answers,
)
from launcher.cli.down import remove_runtime_files, shut_down
from launcher.cli.log_tail import LogTail
from launcher.cli.up import CONTROLLER_SECONDS, POLL_SECONDS, Report, Up, UpError
from launcher.config.exit_codes import DONE, FAILED
from launcher.supervision.farm import Farm

START_GRACE = 60.0
"""Seconds added to the load timeouts of all workers: the deadline of the whole wait."""
CHECK_SECONDS = 0.2


def wait_or_shut_down(start: Up, farm: Farm) -> dict[str, Any]:
    """Wait for the workers; shut down a farm started here in which none can serve."""
    try:
        return wait_for_workers(farm, start.report, start.child)
    except UpError as error:
        if start.child is None or may_serve(farm):
            raise
        with start.state.lock(wait=CONTROLLER_SECONDS):
            shut_down(farm)
            remove_runtime_files(farm.state)
        raise UpError(f"{error}; the farm was shut down") from None


def wait_for_workers(
    farm: Farm, report: Report, child: subprocess.Popen[bytes] | None = None
) -> dict[str, Any]:
    """Wait until every desired worker is ready, reporting changes. Returns `GET /workers`.

    ``child``: supervisord, where this process started it. Raises UpError when a worker cannot
    start, when the farm ends, or when the deadline passes.
    """
    client = Client(farm)
    settings = [generation.settings.workers for generation in farm.generations]
    # A worker that is being replaced may have a request to finish first.
    each = max(one.load_timeout + one.request_timeout for one in settings)
    count = max(generation.plan.capacity for generation in farm.generations)
    deadline = time.monotonic() + CONTROLLER_SECONDS + START_GRACE + max(1, count) * each
    reporter = WorkerReporter(report)
    last_response = time.monotonic()
    while time.monotonic() < deadline:
        if child is not None and child.poll() is not None:
            raise UpError(f"supervisord ended; see {farm.state.logs}")
        if child is None and not supervisor_answers(farm) and farm.state.farm_file.exists():
            raise UpError("the farm's supervisor has ended; `gpufarm up` brings it back")
        try:
            view = client.workers()
        except ControllerUnavailableError as error:
            if not farm.state.farm_file.exists():
                raise UpError("the farm was stopped by another command") from None
            if time.monotonic() - last_response > CONTROLLER_SECONDS:
                raise UpError(f"{error}; see {farm.state.logs / 'controller.log'}") from None
        else:
            last_response = time.monotonic()
            reporter.report_changes(view)
            if view["settled"]:
                raise_on_failure(view, farm.generations[-1].number)
                return view
        time.sleep(POLL_SECONDS)
    raise UpError("the workers are not ready in time; see `gpufarm ps` and `gpufarm logs`")


@dataclass
class WorkerReporter:
    """Reports each change of a worker's state once."""

    report: Report
    states: dict[str, tuple[str, str]] | None = None

    def report_changes(self, view: dict[str, Any]) -> None:
        before = self.states or {}
        for worker in view["workers"]:
            id_, state, error = worker["id"], worker["state"], worker["error"] or ""
            if before.get(id_) == (state, error):
                continue
            if state == "ready" and id_ in before and worker["ready_seconds"] is not None:
                self.report(f"{id_} is ready after {worker['ready_seconds']:.1f} s")
            elif state == "starting" and before.get(id_, ("", ""))[0] != state:
                self.report(f"{id_} is starting on {worker['device']}")
            elif state == "stopped" and error:
                self.report(error)
        self.states = {
            worker["id"]: (worker["state"], worker["error"] or "") for worker in view["workers"]
        }


def raise_on_failure(view: dict[str, Any], number: int) -> None:
    """Raise UpError where a worker, a rollout or a rolling restart of a settled farm failed, or
    where another generation than ``number`` is current."""
    failed: dict[str, list[str]] = {}
    for worker in view["workers"]:
        if worker["gave_up"] and worker["desired"] and worker["error"]:
            reason = worker["error"].removeprefix(worker["id"]).strip()
            failed.setdefault(reason, []).append(worker["id"])
    if failed:
        raise UpError("; ".join(f"{', '.join(ids)} {reason}" for reason, ids in failed.items()))
    if failure := view["generation"]["failure"]:
        raise UpError(f"{failure}; the previous configuration stays in force")
    if view["restart"]["error"]:
        raise UpError(view["restart"]["error"])
    if view["generation"]["current"] != number:
        raise UpError("another command has put another configuration in force meanwhile")


class _StopSignalError(BaseException):
    """SIGTERM or SIGINT arrived while the farm was starting."""


def run_in_foreground(start: Up) -> int:
    """Start the farm and print every process's log until SIGTERM or SIGINT, then drain.

    Returns supervisord's exit code, 0 after a drain, or 1 where no worker can serve, so that a
    container's runtime notices. Raises what starting raises.
    """
    _handle_stop_signals(_raise_stop_signal)
    try:
        with start.state.lock():
            farm = start.bring_up()
    except _StopSignalError:
        if start.farm is not None and start.child is not None:
            shut_down(start.farm)
            remove_runtime_files(start.state)
        return 0
    if start.child is None:
        raise UpError("the farm already runs; end it with `gpufarm down` first")
    return _ForegroundFarm(start, farm, start.child).run()


class _ForegroundFarm:
    """A started farm whose logs are printed until it ends."""

    def __init__(self, start: Up, farm: Farm, child: subprocess.Popen[bytes]) -> None:
        self._report = start.report
        self._farm = farm
        self._child = child
        self._stop = threading.Event()
        self._cannot_serve = False
        as_json = farm.settings.logs.format == "json"
        self._logs = LogTail(farm.state.logs, (), _print, lines=0, as_json=as_json)

    def run(self) -> int:
        """Print logs until a signal, or until supervisord ends; then drain. Returns exit code."""
        _handle_stop_signals(self._on_stop_signal)
        threading.Thread(target=self._await_ready, daemon=True).start()
        self._logs.follow(lambda: self._stop.is_set() or self._child.poll() is not None)
        stopped_by_signal = self._stop.is_set()
        shutdown = threading.Thread(target=shut_down, args=(self._farm,))
        shutdown.start()
        while shutdown.is_alive():  # draining may take long: its logs are printed too
            self._child.poll()
            self._logs.print_new()
            shutdown.join(CHECK_SECONDS)
        self._logs.print_new()
        code = self._child.wait()
        remove_runtime_files(self._farm.state)
        if self._cannot_serve:
            return FAILED
        return DONE if stopped_by_signal and code == 0 else code if code > 0 else int(code < 0)

    def _on_stop_signal(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._stop.set()

    def _await_ready(self) -> None:
        """Report when the farm is ready; stop it where no worker can serve."""
        try:
            view = wait_for_workers(self._farm, self._report, self._child)
            ready = sum(worker["state"] == "ready" for worker in view["workers"])
            workers = "1 worker is" if ready == 1 else f"{ready} workers are"
            _print(f"gpufarm | {workers} ready at {self._farm.url}")
        except (UpError, ControllerUnavailableError) as error:
            if self._stop.is_set():
                return
            _print(f"gpufarm | {error}")
            if not may_serve(self._farm):
                self._cannot_serve = True
                self._stop.set()


def _handle_stop_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _raise_stop_signal(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise _StopSignalError


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
