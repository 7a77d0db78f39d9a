"""Measure a footprint: start one worker, run its longest requests, and sample its memory."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from launcher.config.exit_codes import CANNOT_LOAD, LOAD_FAILED
from launcher.config.settings import ProbeRequest
from launcher.config.sizes import MIB
from launcher.planning.inventory import Footprint
from launcher.planning.sampling import MemoryWatch, Sampler

ROUNDS = 2
"""How many times the longest requests run after warm-up: allocators grow again on the second."""


class MeasureError(Exception):
    """The footprint could not be measured. One line with the cause and the remedy; exit code 1."""


class DisturbedError(MeasureError):
    """Other processes changed the device's memory so much that the worker's use is unknown."""


class RunningWorker(Protocol):
    """One worker that runs only to be measured."""

    pid: int
    host: str
    port: int
    ready_path: str
    """Responds with 2xx or 3xx once the worker is ready."""

    def exit_code(self) -> int | None:
        """Return its exit code; None while it runs."""

    def exit_reason(self) -> str:
        """Return the last line it logged; empty when there is none."""

    def stop(self) -> None:
        """End it and wait for its exit. Does nothing when it has ended already."""


@dataclass(frozen=True)
class Probe:
    """A request to run while measuring."""

    method: str
    path: str
    body: bytes = b""
    content_type: str = ""

    @classmethod
    def of(cls, request: ProbeRequest) -> Probe:
        """Build it from the configuration. Raises MeasureError when body_file cannot be read."""
        if request.body_file is not None:
            try:
                body = request.body_file.read_bytes()
            except OSError as error:
                raise MeasureError(
                    f"footprint.requests: cannot read body_file: {request.body_file}: "
                    f"{error.strerror}"
                ) from None
            kind = request.content_type or "application/octet-stream"
            return cls("POST", request.path, body, kind)
        if request.body is not None:
            kind = request.content_type or "application/json"
            return cls("POST", request.path, json.dumps(request.body).encode(), kind)
        return cls("GET", request.path)


Progress = Callable[[str], None]


def measure(
    start: Callable[[], RunningWorker],
    sampler: Sampler,
    requests: Sequence[Probe],
    *,
    load_timeout: float,
    request_timeout: float,
    device: str = "",
    progress: Progress = lambda message: None,
) -> Footprint:
    """Start one worker, warm it up with the requests, run them again, and end it.

    Without ``requests`` the worker's own ``longest_request`` is used. Peak is the highest use until
    it is warm, steady the highest use after that. Timeouts are in seconds. Raises MeasureError, or
    DisturbedError when other processes changed the device's memory. Always ends the worker.
    """
    sampler.begin()
    progress("starting one worker")
    try:
        worker = start()
    except OSError as error:
        raise MeasureError(f"the worker could not be started: {error}") from None
    watch = MemoryWatch(lambda: sampler.sample(worker.pid))
    try:
        with watch.running():
            _await_ready(worker, load_timeout)
            probes = list(requests) or longest_requests(worker)
            progress(f"running its longest requests ({len(probes)}) to warm it up")
            _run(worker, probes, request_timeout)
            watch.enter("serving")
            progress("running them again and measuring its memory")
            for _ in range(ROUNDS):
                _run(worker, probes, request_timeout)
            watch.take()
    except LookupError as error:
        raise MeasureError(f"the device does not report its free memory: {error}") from None
    finally:
        worker.stop()
    if watch.failed:
        raise MeasureError(f"the device does not report its free memory: {watch.failed}")
    progress("waiting for its memory to be freed")
    return _result(watch, sampler, len(probes) * (1 + ROUNDS), device)


def _result(watch: MemoryWatch, sampler: Sampler, requests: int, device: str) -> Footprint:
    steady, exact = watch.device["serving"], sampler.returned()
    if steady < MIB and not exact:
        raise DisturbedError(
            f"other processes freed memory of {device or 'the device'} while the footprint was "
            f"measured; try again when it is idle, or set footprint.bytes"
        )
    if steady < MIB:
        raise MeasureError(
            f"the worker used no memory of {device or 'its device'}; load the model onto the "
            f"device that setup(device) gets, or set footprint.bytes"
        )
    return Footprint(
        peak=max(steady, watch.device.get("starting", 0)),
        steady=steady,
        host_ram=watch.host or None,
        how="measured",
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        device=device,
        samples=watch.samples,
        requests=requests,
        exact=exact,
    )


def longest_requests(worker: RunningWorker) -> list[Probe]:
    """Return the longest requests that the model itself defines; empty when it defines none."""
    with suppress(OSError, http.client.HTTPException, ValueError, AttributeError):
        status, body = _send(worker, Probe("GET", "/longest_request"), timeout=30.0)
        found = json.loads(body) if status < 300 else None
        return [_probe(item) for item in (found if isinstance(found, list) else [found]) if item]
    return []


def _probe(item: Mapping[str, Any]) -> Probe:
    body = json.dumps(item.get("json", {})).encode()
    return Probe("POST", str(item.get("path", "/predict")), body, "application/json")


def _await_ready(worker: RunningWorker, timeout: float) -> None:
    deadline, detail = time.monotonic() + timeout, ""
    while time.monotonic() < deadline:
        code = worker.exit_code()
        if code is not None:
            reason = worker.exit_reason()
            if code in (LOAD_FAILED, CANNOT_LOAD) and reason:
                raise MeasureError(f"the worker could not load: {reason}")
            detail = f": {reason}" if reason else ""
            raise MeasureError(
                f"the worker ended with exit code {code} before it was ready{detail}"
            )
        with suppress(OSError, http.client.HTTPException):
            status, _ = _send(worker, Probe("GET", worker.ready_path), timeout=5.0)
            if 200 <= status < 400:
                return
            detail = f": {worker.ready_path} returned {status}"
        time.sleep(0.1)
    detail += f"; its last log line: {reason}" if (reason := worker.exit_reason()) else ""
    raise MeasureError(
        f"the worker was not ready within {timeout:g} s (workers.load_timeout){detail}"
    )


def _run(worker: RunningWorker, probes: Sequence[Probe], timeout: float) -> None:
    for probe in probes:
        name = f"{probe.method} {probe.path}"
        try:
            status, body = _send(worker, probe, timeout)
        except TimeoutError:
            raise MeasureError(
                f"{name} took longer than {timeout:g} s (workers.request_timeout)"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            exit_message = _exit_message(worker)
            reason = str(error) or type(error).__name__
            raise MeasureError(f"{name} failed: {reason}{exit_message}") from None
        if status >= 400:
            text = " ".join(body[:200].decode(errors="replace").split())
            remedy = "correct footprint.requests"
            if status >= 500:
                remedy = "see `gpufarm logs measure`, and correct the model or footprint.requests"
            raise MeasureError(f"{name} returned {status}: {text}; {remedy}")


def _exit_message(worker: RunningWorker, timeout: float = 2.0) -> str:
    """Describe its exit; empty if it still runs after ``timeout`` seconds.

    A connection breaks a moment before the process exits.
    """
    deadline = time.monotonic() + timeout
    while (code := worker.exit_code()) is None:
        if time.monotonic() > deadline:
            return ""
        time.sleep(0.02)
    detail = f": {reason}" if (reason := worker.exit_reason()) else ""
    return f"; the worker ended with exit code {code}{detail}"


def _send(worker: RunningWorker, probe: Probe, timeout: float) -> tuple[int, bytes]:
    """Send a request and read the whole response within ``timeout`` seconds.

    Returns the status and the first MiB of the body. Raises TimeoutError, OSError, HTTPException.
    """
    deadline = time.monotonic() + timeout
    connection = http.client.HTTPConnection(worker.host, worker.port, timeout=timeout)
    try:
        headers = {"Content-Type": probe.content_type} if probe.content_type else {}
        connection.request(probe.method, probe.path, probe.body or None, headers)
        response = connection.getresponse()
        beginning = response.read(1 << 20)
        while response.read1(1 << 16):
            if time.monotonic() > deadline:
                raise TimeoutError
        return response.status, beginning
    finally:
        connection.close()
