"""A private MPS daemon: started for some sections, always stopped again.

The device's settings (compute mode, clocks) stay as they are. The daemon has its own pipe and log
folders, so that another user's daemon is neither used nor disturbed.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from benchmarks.gpu.job import BenchmarkError

CONTROL = "nvidia-cuda-mps-control"
CONTROL_TIMEOUT = 20.0
STOP_TIMEOUT = 15.0


def control(environment: Mapping[str, str], command: str) -> str:
    """Send a command to the daemon and return its response. Raises BenchmarkError."""
    try:
        done = subprocess.run(
            [CONTROL],
            input=command + "\n",
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=CONTROL_TIMEOUT,
            check=False,
        )
    except FileNotFoundError:
        raise BenchmarkError(
            f"{CONTROL} is not on the PATH: is the driver's MPS installed?"
        ) from None
    except subprocess.TimeoutExpired:
        raise BenchmarkError(
            f"{CONTROL} did not respond to {command!r} within {CONTROL_TIMEOUT:g} s"
        ) from None
    if done.returncode != 0:
        output = " ".join((done.stdout + done.stderr).split())
        raise BenchmarkError(f"{CONTROL} {command!r} ended with code {done.returncode}: {output}")
    return done.stdout


def clients(environment: Mapping[str, str]) -> list[int]:
    """Return the processes attached to the daemon's servers. Raises BenchmarkError."""
    found: list[int] = []
    for server in _numbers(control(environment, "get_server_list")):
        found += _numbers(control(environment, f"get_client_list {server}"))
    return found


def check_attached(environment: Mapping[str, str], pids: list[int]) -> str:
    """Check that all ``pids`` are clients, and return how that is known.

    A process that fails to attach runs on without MPS and reports nothing. Raises BenchmarkError
    when one is not attached.
    """
    found = clients(environment)
    if set(pids) <= set(found):
        return "by pid"
    # In a container the daemon may report pids of another namespace.
    if len(found) == len(pids) and not set(pids) & set(found):
        return "by number"
    missing = sorted(set(pids) - set(found))
    raise BenchmarkError(f"processes are not attached to MPS: {missing}; its clients are {found}")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split() if word.isdigit()]


@contextmanager
def daemon(around: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Run a daemon and yield the environment that makes processes its clients.

    Raises BenchmarkError.
    """
    if shutil.which(CONTROL) is None:
        raise BenchmarkError(f"{CONTROL} is not on the PATH: is the driver's MPS installed?")
    # A short path: socket names are limited to about a hundred characters.
    folder = Path(tempfile.mkdtemp(prefix="gpufarm-mps-"))
    environment = {
        **around,
        "CUDA_MPS_PIPE_DIRECTORY": str(folder / "pipe"),
        "CUDA_MPS_LOG_DIRECTORY": str(folder / "log"),
    }
    for name in ("pipe", "log"):
        (folder / name).mkdir()
    try:
        _start(environment, folder)
        yield environment
    finally:
        _stop(environment, folder)
        shutil.rmtree(folder, ignore_errors=True)


def _start(environment: Mapping[str, str], folder: Path) -> None:
    # Its output goes to a file: the daemon inherits it, and a pipe would never reach its end.
    output = folder / "start"
    with output.open("wb") as out:
        try:
            done = subprocess.run(
                [CONTROL, "-d"],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                timeout=CONTROL_TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise BenchmarkError(
                f"{CONTROL} -d did not return within {CONTROL_TIMEOUT:g} s"
            ) from None
    if done.returncode != 0:
        raise BenchmarkError(
            f"{CONTROL} -d: {' '.join(output.read_text(errors='replace').split())}"
        )
    control(environment, "get_server_list")


def _stop(environment: Mapping[str, str], folder: Path) -> None:
    """Stop the daemon. Raises BenchmarkError when one of its processes does not exit."""
    left = _processes(folder)
    with suppress(BenchmarkError):
        control(environment, "quit -t 5")
    for end in ("", "terminate", "kill"):
        for process in left:
            if end:
                with suppress(psutil.Error):
                    getattr(process, end)()
        _, left = psutil.wait_procs(left, timeout=STOP_TIMEOUT)
        if not left:
            return
    raise BenchmarkError(f"the MPS daemon does not exit: pids {[process.pid for process in left]}")


def _processes(folder: Path) -> list[psutil.Process]:
    """Return this daemon and its servers, recognised by their pipe folder."""
    begun = time.monotonic()
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if not process.name().startswith("nvidia-cuda-mps"):
                continue
            if process.environ().get("CUDA_MPS_PIPE_DIRECTORY") == str(folder / "pipe"):
                found.append(process)
        if time.monotonic() - begun > STOP_TIMEOUT:
            break
    return found
