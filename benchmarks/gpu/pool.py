"""Worker processes as their employer sees them: started, asked, and always ended again."""

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

from benchmarks.gpu.job import Job, ProofError

READY_WITHIN = 60.0
ANSWER_WITHIN = 30.0


class WorkerProcess:
    """``python -m benchmarks.gpu.worker`` at the other end of two pipes."""

    def __init__(self, name: str, kind: str, job: Job) -> None:
        self.name = name
        self._log = job.log(name)
        self._text = b""
        self.told: dict[str, Any] = {}
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
        """Raises ProofError."""
        self.told = self.receive(READY_WITHIN)

    def send(self, **order: Any) -> None:
        """Raises ProofError when the process has gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
        except OSError:
            raise self._gone() from None

    def receive(self, seconds: float = ANSWER_WITHIN) -> dict[str, Any]:
        """The next answer. Raises ProofError when the process dies or says nothing in time."""
        assert self._process.stdout is not None
        out, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._text:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([out], [], [], left)[0]:
                raise ProofError(f"{self.name} did not answer within {seconds:g} s")
            part = os.read(out, 1 << 16)
            if not part:
                raise self._gone()
            self._text += part
        line, _, self._text = self._text.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **order: Any) -> dict[str, Any]:
        self.send(**order)
        return self.receive()

    def let_go(self) -> None:
        """No more orders: it leaves once it has done what it is at."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def close(self) -> None:
        """Let it go and wait until it has gone, by force if need be."""
        self.let_go()
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

    def _gone(self) -> ProofError:
        code = self._process.wait(10)
        lines = self._log.read_text(errors="replace").strip().splitlines()
        last = f": {lines[-1]}" if lines else ""
        return ProofError(f"{self.name} ended with code {code}{last}")


class Crew:
    """Workers of one kind, numbered from 1."""

    def __init__(self, kind: str, job: Job, label: str) -> None:
        self.kind, self.job, self.label = kind, job, label
        self.members: list[WorkerProcess] = []

    def hire(self, count: int) -> None:
        """Start ``count`` more at once and wait until all are ready. Raises ProofError."""
        first = len(self.members)
        for number in range(first + 1, first + count + 1):
            name = f"{self.label}-worker-{number}"
            self.members.append(WorkerProcess(name, self.kind, self.job))
        for member in self.members[first:]:
            member.wait_ready()

    def dismiss(self) -> None:
        for member in self.members:  # all at once first: leaving a device takes a second
            member.let_go()
        for member in self.members:
            member.close()


@contextmanager
def crew(kind: str, job: Job, label: str) -> Iterator[Crew]:
    """None of its workers outlives the block."""
    found = Crew(kind, job, label)
    try:
        yield found
    finally:
        found.dismiss()
