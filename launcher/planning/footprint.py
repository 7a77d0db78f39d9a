"""Measuring a footprint: one worker alone, its longest requests, and the device watched."""

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
from launcher.planning.sampling import Sampler, Watch

ROUNDS = 2
"""How often the longest requests are run once warm: allocators grow again on the second."""


class MeasureError(Exception):
    """The footprint could not be measured. One line: what happened and what to do; exit code 1."""


class DisturbedError(MeasureError):
    """Other processes moved the device's memory so much that nothing can be said of the worker."""


class RunningWorker(Protocol):
    """One worker, started alone."""

    pid: int
    host: str
    port: int
    ready_path: str
    """Answers 2xx or 3xx once the worker is ready."""

    def exit_code(self) -> int | None:
        """None while it runs."""

    def last_words(self) -> str:
        """The last line it wrote; empty when there is none."""

    def stop(self) -> None:
        """End it and wait until it has ended. Never raises because it has gone already."""


@dataclass(frozen=True)
class Probe:
    """A request to run while measuring."""

    method: str
    path: str
    body: bytes = b""
    content_type: str = ""

    @classmethod
    def of(cls, request: ProbeRequest) -> Probe:
        """From the configuration. Raises MeasureError when the body's file cannot be read."""
        if request.body_file is not None:
            try:
                body = request.body_file.read_bytes()
            except OSError as error:
                raise MeasureError(
                    f"footprint.requests: {request.body_file}: {error.strerror}"
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

    Without ``requests`` the worker is asked for its ``longest_request`` (GET /health). Peak is the
    highest use until it is warm, steady the highest use afterwards. Seconds for the deadlines.
    Raises MeasureError, DisturbedError where other processes spoilt it; the worker is ended
    whatever happens.
    """
    sampler.begin()
    progress("starting one worker alone")
    try:
        worker = start()
    except OSError as error:
        raise MeasureError(f"the worker could not be started: {error}") from None
    watch = Watch(lambda: sampler.sample(worker.pid))
    try:
        with watch.watching():
            _await_ready(worker, load_timeout)
            probes = list(requests) or longest_requests(worker)
            progress(f"running its longest requests ({len(probes)}) to warm it up")
            _run(worker, probes, request_timeout)
            watch.enter("serving")
            progress("running them again, and watching its memory")
            for _ in range(ROUNDS):
                _run(worker, probes, request_timeout)
            watch.take()
    except LookupError as error:
        raise MeasureError(f"the device does not tell its free memory: {error}") from None
    finally:
        worker.stop()
    if watch.failed:
        raise MeasureError(f"the device does not tell its free memory: {watch.failed}")
    progress("waiting for its memory to return")
    return _result(watch, sampler, len(probes) * (1 + ROUNDS), device)


def _result(watch: Watch, sampler: Sampler, requests: int, device: str) -> Footprint:
    steady, exact = watch.device["serving"], sampler.returned()
    if steady < MIB and not exact:
        raise DisturbedError(
            f"other processes gave back memory of {device or 'the device'} while the footprint was "
            f"measured; try again when it is quiet, or set footprint.bytes"
        )
    if steady < MIB:
        raise MeasureError(
            f"the worker took no memory of {device or 'its device'}: does the model run there? "
            f"Load it onto the device that setup(device) is given, or set footprint.bytes"
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
    """What the model itself names as its longest request (one, or a list); none if it does not."""
    with suppress(OSError, http.client.HTTPException, ValueError, AttributeError):
        status, body = _exchange(worker, Probe("GET", "/longest_request"), timeout=30.0)
        named = json.loads(body) if status < 300 else None
        return [_named(item) for item in (named if isinstance(named, list) else [named]) if item]
    return []


def _named(item: Mapping[str, Any]) -> Probe:
    body = json.dumps(item.get("json", {})).encode()
    return Probe("POST", str(item.get("path", "/predict")), body, "application/json")


def _await_ready(worker: RunningWorker, timeout: float) -> None:
    deadline, said = time.monotonic() + timeout, ""
    while time.monotonic() < deadline:
        code = worker.exit_code()
        if code is not None:
            words = worker.last_words()
            if code in (LOAD_FAILED, CANNOT_LOAD) and words:
                raise MeasureError(f"the worker could not load: {words}")
            said = f": {words}" if words else ""
            raise MeasureError(f"the worker ended with exit code {code} before it was ready{said}")
        with suppress(OSError, http.client.HTTPException):
            status, _ = _exchange(worker, Probe("GET", worker.ready_path), timeout=5.0)
            if 200 <= status < 400:
                return
            said = f": {worker.ready_path} was answered {status}"
        time.sleep(0.1)
    said += f"; its last line: {words}" if (words := worker.last_words()) else ""
    raise MeasureError(
        f"the worker was not ready within {timeout:g} s (workers.load_timeout){said}"
    )


def _run(worker: RunningWorker, probes: Sequence[Probe], timeout: float) -> None:
    for probe in probes:
        what = f"{probe.method} {probe.path}"
        try:
            status, body = _exchange(worker, probe, timeout)
        except TimeoutError:
            raise MeasureError(
                f"{what} took longer than {timeout:g} s (workers.request_timeout)"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            ended = _how_it_ended(worker)
            raise MeasureError(f"{what} failed: {error or type(error).__name__}{ended}") from None
        if status >= 400:
            text = " ".join(body[:200].decode(errors="replace").split())
            remedy = "correct footprint.requests"
            if status >= 500:
                remedy = "see `gpufarm logs measure`, and correct the model or footprint.requests"
            raise MeasureError(f"{what} was answered {status}: {text}; {remedy}")


def _how_it_ended(worker: RunningWorker, patience: float = 2.0) -> str:
    """Words about its end; empty if it lives. A connection breaks a moment before the exit."""
    deadline = time.monotonic() + patience
    while (code := worker.exit_code()) is None:
        if time.monotonic() > deadline:
            return ""
        time.sleep(0.02)
    said = f": {words}" if (words := worker.last_words()) else ""
    return f"; the worker ended with exit code {code}{said}"


def _exchange(worker: RunningWorker, probe: Probe, timeout: float) -> tuple[int, bytes]:
    """One request; the status and the beginning of the body. All of it is read, within ``timeout``
    seconds. Raises TimeoutError, OSError, HTTPException."""
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
