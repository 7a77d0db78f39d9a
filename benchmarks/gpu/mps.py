"""A private MPS daemon: started for some sections, always stopped again.

Nothing of the device is changed: no compute mode, no clocks. Its pipe and log folders are its own,
so that a daemon of somebody else is neither used nor disturbed.
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

from benchmarks.gpu.job import ProofError

CONTROL = "nvidia-cuda-mps-control"
ANSWERS_WITHIN = 20.0
STOPS_WITHIN = 15.0


def control(environment: Mapping[str, str], order: str) -> str:
    """What the daemon answers. Raises ProofError."""
    try:
        done = subprocess.run(
            [CONTROL],
            input=order + "\n",
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=ANSWERS_WITHIN,
            check=False,
        )
    except FileNotFoundError:
        raise ProofError(f"{CONTROL} is not on the PATH: is the driver's MPS installed?") from None
    except subprocess.TimeoutExpired:
        raise ProofError(f"{CONTROL} did not answer {order!r} in {ANSWERS_WITHIN:g} s") from None
    if done.returncode != 0:
        said = " ".join((done.stdout + done.stderr).split())
        raise ProofError(f"{CONTROL} {order!r} ended with code {done.returncode}: {said}")
    return done.stdout


def clients(environment: Mapping[str, str]) -> list[int]:
    """The processes attached to the daemon's servers. Raises ProofError."""
    found: list[int] = []
    for server in _numbers(control(environment, "get_server_list")):
        found += _numbers(control(environment, f"get_client_list {server}"))
    return found


def check_attached(environment: Mapping[str, str], pids: list[int]) -> str:
    """How it is known that all are clients: attaching is silent, and so is failing to.

    Raises ProofError when one is not.
    """
    found = clients(environment)
    if set(pids) <= set(found):
        return "by pid"
    # In a container the daemon may tell numbers of another namespace.
    if len(found) == len(pids) and not set(pids) & set(found):
        return "by number"
    missing = sorted(set(pids) - set(found))
    raise ProofError(f"not attached to MPS: {missing}; its clients are {found}")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split() if word.isdigit()]


@contextmanager
def daemon(around: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The environment in which processes become its clients. Raises ProofError."""
    if shutil.which(CONTROL) is None:
        raise ProofError(f"{CONTROL} is not on the PATH: is the driver's MPS installed?")
    # A short path: sockets' names are limited to about a hundred characters.
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
    # Its output goes to a file: the daemon inherits it, and a pipe would never be at its end.
    said = folder / "start"
    with said.open("wb") as out:
        try:
            done = subprocess.run(
                [CONTROL, "-d"],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                timeout=ANSWERS_WITHIN,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ProofError(f"{CONTROL} -d did not return in {ANSWERS_WITHIN:g} s") from None
    if done.returncode != 0:
        raise ProofError(f"{CONTROL} -d: {' '.join(said.read_text(errors='replace').split())}")
    control(environment, "get_server_list")


def _stop(environment: Mapping[str, str], folder: Path) -> None:
    """Raises ProofError when a daemon is left that cannot be ended."""
    left = _processes(folder)
    with suppress(ProofError):
        control(environment, "quit -t 5")
    for end in ("", "terminate", "kill"):
        for process in left:
            if end:
                with suppress(psutil.Error):
                    getattr(process, end)()
        _, left = psutil.wait_procs(left, timeout=STOPS_WITHIN)
        if not left:
            return
    raise ProofError(f"the MPS daemon does not end: {[process.pid for process in left]}")


def _processes(folder: Path) -> list[psutil.Process]:
    """The daemon that was started here and its servers, known by the folder they were given."""
    begun = time.monotonic()
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if not process.name().startswith("nvidia-cuda-mps"):
                continue
            if process.environ().get("CUDA_MPS_PIPE_DIRECTORY") == str(folder / "pipe"):
                found.append(process)
        if time.monotonic() - begun > STOPS_WITHIN:
            break
    return found
