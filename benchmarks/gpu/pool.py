"""A pool of worker processes: started, sent commands, and always stopped again."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from benchmarks.gpu.job import BenchmarkError, Job

READY_TIMEOUT = 60.0
RESPONSE_TIMEOUT = 30.0


class WorkerProcess:
    """``python -m benchmarks.gpu.worker`` at the other end of two pipes."""

    def __init__(self, name: str, kind: str, job: Job) -> None:
        self.name = name
        self._log = job.log(name)
        self._text = b""
        self.ready: dict[str, Any] = {}
        module = "benchmarks.gpu.worker"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, kind, job.to_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> None:
        """Wait for the worker's ready message. Raises BenchmarkError."""
        self.ready = self.receive(READY_TIMEOUT)

    def send(self, **command: Any) -> None:
        """Send a command. Raises BenchmarkError when the process has exited."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
        except OSError:
            raise self._exit_error() from None

    def receive(self, seconds: float = RESPONSE_TIMEOUT) -> dict[str, Any]:
        """Return the next response. Raises BenchmarkError when the process exits or is too late."""
        assert self._process.stdout is not None
        out, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._text:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([out], [], [], left)[0]:
                raise BenchmarkError(f"{self.name} did not respond within {seconds:g} s")
            part = os.read(out, 1 << 16)
            if not part:
                raise self._exit_error()
            self._text += part
        line, _, self._text = self._text.partition(b"\n")
        response: dict[str, Any] = json.loads(line)
        return response

    def ask(self, **command: Any) -> dict[str, Any]:
        self.send(**command)
        return self.receive()

    def close_stdin(self) -> None:
        """Send no more commands: the worker exits after the one that it is running."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def close(self) -> None:
        """Stop the worker and wait for its exit, by signals if necessary."""
        self.close_stdin()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _exit_error(self) -> BenchmarkError:
        code = self._process.wait(10)
        lines = self._log.read_text(errors="replace").strip().splitlines()
        last = f": {lines[-1]}" if lines else ""
        return BenchmarkError(f"{self.name} exited with code {code}{last}")


class WorkerPool:
    """Workers of one kind, numbered from 1."""

    def __init__(self, kind: str, job: Job, label: str) -> None:
        self.kind, self.job, self.label = kind, job, label
        self.members: list[WorkerProcess] = []

    def start(self, count: int) -> None:
        """Start ``count`` more at once and wait until all are ready. Raises BenchmarkError."""
        first = len(self.members)
        for number in range(first + 1, first + count + 1):
            name = f"{self.label}-worker-{number}"
            self.members.append(WorkerProcess(name, self.kind, self.job))
        for member in self.members[first:]:
            member.wait_ready()

    def close(self) -> None:
        for member in self.members:  # all at once first: releasing a device takes a second
            member.close_stdin()
        for member in self.members:
            member.close()


@contextmanager
def worker_pool(kind: str, job: Job, label: str) -> Iterator[WorkerPool]:
    """Make an empty pool; none of its workers outlives the block."""
    found = WorkerPool(kind, job, label)
    try:
        yield found
    finally:
        found.close()
