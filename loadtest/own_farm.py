"""Farms that a load test starts by itself, with the command ``gpufarm``, and stops afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import SystemRandom
from typing import Any

SLEEP_MODEL = "loadtest.sleep_model:Sleep"
# What a worker that only sleeps takes is known well enough; measuring it would take longer than
# the load test. No device is used, so the figures are the same with and without a GPU.
_SLEEPERS = """
host = "127.0.0.1"
port = {port}
state_dir = "state"
[model]
target = "{model}"
[workers]
count = {workers}
max = {slots}
[footprint]
bytes = "128MiB"
[budget]
devices = ["cpu"]
"""
_PORTS = (10000, 19999)
"""Below those that ``gpufarm`` takes for slots, and the kernel for outgoing connections."""
NONE_RUNS = 4
"""The exit code of ``gpufarm ps`` where no farm runs."""
_SLOTS = 16
"""As many as a farm has unless configured otherwise: nginx passes over the empty ones."""

Say = Callable[[str], None]


class StartError(Exception):
    """The farm did not start; the command has said why. ``code`` is its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__("`gpufarm up` failed; what it said stands above")
        self.code = code


@contextmanager
def running_or_new(keep: bool, say: Say) -> Iterator[str]:
    """The address of the farm that runs, or of a new one, stopped at the end unless ``keep``.

    Raises StartError.
    """
    code, running = _gpufarm(["ps", "--json"], loud=False)
    if running is not None:
        yield running["url"]
        return
    if code != NONE_RUNS:
        _gpufarm(["ps"], loud=True)  # it says what is wrong with the farm that runs
        raise StartError(code)
    say("no farm is running; starting one")
    with _started(["up", "--json"], ["down"], keep) as url:
        yield url


@contextmanager
def sleepers(workers: int, say: Say) -> Iterator[str]:
    """The address of a farm of workers that sleep, gone at the end with all its files.

    Raises StartError.
    """
    with tempfile.TemporaryDirectory(prefix="gpufarm-sleep-") as folder:
        file = Path(folder) / "gpufarm.toml"
        settings = {"port": _free_port(), "workers": workers, "slots": max(workers, _SLOTS)}
        file.write_text(_SLEEPERS.format(model=SLEEP_MODEL, **settings), encoding="utf-8")
        say(f"starting a farm with {workers} workers of {SLEEP_MODEL}")
        named = ["--config", str(file)]
        # What the caller has set in its environment is meant for another farm.
        plain = {name: text for name, text in os.environ.items() if not name.startswith("GPUFARM_")}
        with _started(["up", *named, "--json"], ["down", *named], environment=plain) as url:
            yield url


@contextmanager
def _started(
    up: list[str], down: list[str], keep: bool = False, environment: dict[str, str] | None = None
) -> Iterator[str]:
    with _ended_like_by_ctrl_c():
        said = None
        try:
            code, started = _gpufarm(up, loud=True, environment=environment)
            if started is None:
                # ``up`` has said all there is to say; what it started so far is to be ended still.
                said, keep = subprocess.DEVNULL, False
                raise StartError(code)
            yield started["url"]
        finally:
            if not keep:
                words = [*command(), *down]
                subprocess.run(words, env=environment, stdout=said, stderr=said, check=False)


@contextmanager
def _ended_like_by_ctrl_c() -> Iterator[None]:
    """SIGTERM would end this process at once, and leave its farm running."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def command() -> list[str]:
    beside = Path(sys.executable).with_name("gpufarm")
    found = str(beside) if beside.exists() else shutil.which("gpufarm")
    return [found] if found else [sys.executable, "-m", "launcher.cli"]


def _gpufarm(
    words: list[str], loud: bool, environment: dict[str, str] | None = None
) -> tuple[int, dict[str, Any] | None]:
    """Its exit code, and what it prints as JSON, None where it fails. ``loud``: messages show."""
    messages = None if loud else subprocess.DEVNULL
    done = subprocess.run(
        [*command(), *words],
        stdout=subprocess.PIPE,
        stderr=messages,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        return done.returncode, None
    result: dict[str, Any] = json.loads(done.stdout)
    return 0, result


def _free_port() -> int:
    dice = SystemRandom()
    for _ in range(200):
        port = dice.randint(*_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no free port between {_PORTS[0]} and {_PORTS[1]}")
