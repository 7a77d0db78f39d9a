"""One section of the proof, in a process of its own: ``… .section NAME JOB ROWS``.

A process of its own, because an error of the device stays with the process that met it, and a
hanging kernel can be ended only with its process. Rows go to a file as they are found, so that a
section that ends early leaves what it had.
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
LEAVES_WITHIN = 15.0
"""Seconds that a section has, once its deadline has passed, to end its workers."""


def carry_out(
    name: str, kind: str, job: Job, deadline: float, environment: Mapping[str, str]
) -> Outcome:
    """Run a section in a child for at most ``deadline`` seconds, and read what it found."""
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
            _end(process)
    rows = []
    if found.exists():
        rows = [json.loads(line) for line in found.read_text().splitlines() if line.endswith("}")]
    told = [row["failed"] for row in rows if "failed" in row]
    rows = [row for row in rows if "failed" not in row]
    reason = told[-1] if told else reason
    return Outcome(name, reason, time.monotonic() - begun, deadline, rows)


def _wait(process: subprocess.Popen[bytes], deadline: float) -> str:
    try:
        code = process.wait(deadline)
    except subprocess.TimeoutExpired:
        return f"not done within {deadline:.0f} s"
    return "" if code == 0 else f"ended with code {code}; see its log"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Nothing that the section started outlives it."""
    if process.poll() is None:
        process.terminate()  # it ends its workers itself, politely
        with suppress(subprocess.TimeoutExpired):
            process.wait(LEAVES_WITHIN)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def leave(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(1)


def end_with_parent() -> None:
    """SIGTERM when the parent has gone: a killed one cannot end its section, which holds a GPU."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> None:
    signal.signal(signal.SIGTERM, leave)
    end_with_parent()
    kind, job, path = sys.argv[1], Job.from_json(sys.argv[2]), Path(sys.argv[3])
    with path.open("w") as out:
        try:
            for row in KINDS[kind](job):
                print(json.dumps(row), file=out, flush=True)
        except Exception as error:  # whatever it is, the other sections go on
            traceback.print_exc()
            message = " ".join(str(error).split())[:300]
            print(json.dumps({"failed": f"{type(error).__name__}: {message}"}), file=out)
            raise SystemExit(1) from None


if __name__ == "__main__":
    main()
