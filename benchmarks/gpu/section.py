"""One section of the benchmark, run in its own process: ``… .section KIND JOB ROWS``.

In its own process, because a CUDA error stays with the process that hit it, and a hanging kernel
ends only with its process. Rows are written to a file as they are measured, so that a section that
ends early leaves the rows it had.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType

from benchmarks.gpu import footprint, scaling, speed
from benchmarks.gpu.job import Job, Outcome, Rows

KINDS: dict[str, Callable[[Job], Rows]] = {
    "speed": speed.decoding,
    "bandwidth": speed.copying,
    "footprint": footprint.run,
    "workers": scaling.run,
}
PR_SET_PDEATHSIG = 1
EXIT_TIMEOUT = 15.0
"""Seconds for a section to stop its workers after its deadline."""


def run_section(
    name: str, kind: str, job: Job, deadline: float, environment: Mapping[str, str]
) -> Outcome:
    """Run a section in a child for at most ``deadline`` seconds and return its rows."""
    found = job.log(name).with_suffix(".jsonl")
    found.unlink(missing_ok=True)
    begun = time.monotonic()
    with job.log(name).open("wb") as log:
        command = [sys.executable, "-m", __spec__.name, kind, job.to_json(), str(found)]
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # its workers can be ended with it
        )
        try:
            reason = _wait(process, deadline)
        finally:
            _terminate(process)
    rows = []
    if found.exists():
        rows = [json.loads(line) for line in found.read_text().splitlines() if line.endswith("}")]
    failures = [row["failed"] for row in rows if "failed" in row]
    rows = [row for row in rows if "failed" not in row]
    reason = failures[-1] if failures else reason
    return Outcome(name, reason, time.monotonic() - begun, deadline, rows)


def _wait(process: subprocess.Popen[bytes], deadline: float) -> str:
    try:
        code = process.wait(deadline)
    except subprocess.TimeoutExpired:
        return f"not finished within {deadline:.0f} s"
    return "" if code == 0 else f"exited with code {code}; see its log"


def _terminate(process: subprocess.Popen[bytes]) -> None:
    """Stop the section and everything that it started."""
    if process.poll() is None:
        process.terminate()  # it stops its workers itself
        with suppress(subprocess.TimeoutExpired):
            process.wait(EXIT_TIMEOUT)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def exit_on_sigterm(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(1)


def exit_with_parent() -> None:
    """Get SIGTERM when the parent dies: a killed parent cannot stop the section on its GPU."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> None:
    signal.signal(signal.SIGTERM, exit_on_sigterm)
    exit_with_parent()
    kind, job, path = sys.argv[1], Job.from_json(sys.argv[2]), Path(sys.argv[3])
    with path.open("w") as out:
        try:
            for row in KINDS[kind](job):
                print(json.dumps(row), file=out, flush=True)
        except Exception as error:  # of any kind: the other sections still run
            traceback.print_exc()
            message = " ".join(str(error).split())[:300]
            print(json.dumps({"failed": f"{type(error).__name__}: {message}"}), file=out)
            raise SystemExit(1) from None


if __name__ == "__main__":
    main()
