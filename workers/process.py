"""One worker process: reserve the port, load, warm up, listen, drain, exit.

Exit codes: 0 drained; 1 port in use, device lost, model stuck, or a failed start that a restart may
fix; 3 cannot load, and a restart cannot help; anything else is a crash.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from workers import logs
from workers.errors import LoadError
from workers.http.app import build_app
from workers.http.metrics import Metrics
from workers.http.server import PortTaken, Server, reserve
from workers.http.state import WorkerState
from workers.logs import log
from workers.model.loader import load
from workers.model.spec import Spec, read_spec
from workers.queueing.crash_guard import CrashGuard
from workers.queueing.health import HealthReports
from workers.queueing.queue import RequestQueue
from workers.queueing.watchdog import start_watchdog

EXIT_FAILED = 1
EXIT_CANNOT_LOAD = 3
EXIT_INTERRUPTED = 130

_CALL_TIMEOUT = 2.0
"""Seconds after the drain that a call without a client may still run."""

_EXIT_TIMEOUT = 5.0
"""Seconds for the model's threads and exit handlers to finish."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the worker and return its exit code. Exits the process itself where a stuck thread would
    keep it alive."""
    options = _options(arguments)
    faulthandler.enable()  # a crash in a native library leaves a traceback
    logs.set_up(options.id)
    try:
        return _serve(options)
    except LoadError as error:
        log.error("cannot load: %s", error)
        return _exit(EXIT_CANNOT_LOAD if error.permanent else EXIT_FAILED)
    except PortTaken as error:
        log.error("cannot listen: %s", error)
        return _exit(EXIT_FAILED)
    except KeyboardInterrupt:
        log.error("interrupted while loading")
        return _exit(EXIT_INTERRUPTED)


def _serve(options: argparse.Namespace) -> int:
    spec = read_spec(options.spec)
    logs.set_up(options.id, spec.log_format)
    if spec.cache_dir is not None:
        os.environ.setdefault("GPUFARM_CACHE_DIR", str(spec.cache_dir))
    with reserve(options.host, options.port) as reserved:
        return _load_and_listen(options, spec, reserved)


def _load_and_listen(options: argparse.Namespace, spec: Spec, reserved: socket.socket) -> int:
    device_thread = ThreadPoolExecutor(1, thread_name_prefix="device")
    began = time.perf_counter()
    loaded = load(spec, options.device, device_thread)
    queue = RequestQueue(device_thread, spec.queue_size, CrashGuard(spec.cache_dir, options.id))
    queue.on_request_ended = HealthReports(queue, loaded).request_ended
    metrics = Metrics(options.id, spec.name, queue)
    for phase, seconds in loaded.startup_seconds.items():
        metrics.started(phase, seconds)
    encoder_thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
    worker = WorkerState(options.id, spec, loaded, device_thread, encoder_thread, queue, metrics)
    log.info(
        "loaded %s device=%s seconds=%.2f", spec.target, options.device, time.perf_counter() - began
    )
    start_watchdog(queue, spec.request_timeout)
    Server(build_app(worker), worker).listen(reserved)
    return _finish(queue)


def _finish(queue: RequestQueue) -> int:
    """Finish after the drain: every request has its response, but a call whose client has
    disconnected may still run for a moment."""
    deadline = time.monotonic() + _CALL_TIMEOUT
    while queue.running and time.monotonic() < deadline:
        time.sleep(0.02)
    log.info("drained served=%d", queue.completed)
    if queue.running:
        log.warning(
            "a model call without a client is still running after %g s; exiting without it",
            _CALL_TIMEOUT,
        )
        os._exit(0)
    return _exit(0)


def _exit(code: int) -> int:
    """Return the exit code, and force the exit if the model's threads block it."""
    guard = threading.Timer(_EXIT_TIMEOUT, os._exit, (code,))
    guard.daemon = True
    guard.start()
    return code


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -P -m workers", description="Serve one model on one device, one at a time."
    )
    parser.add_argument(
        "--spec", type=Path, required=True, help="JSON file with the model and its limits"
    )
    parser.add_argument("--id", required=True, help="name of this worker, such as w1")
    parser.add_argument("--port", type=int, required=True, help="TCP port; 0 picks a free one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--device", default="cpu", help="device passed to setup(): cuda:0 or cpu")
    return parser.parse_args(arguments)
