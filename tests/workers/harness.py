"""A real worker process for a test, with deadlines for everything."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import httpx

from tests.repository import REPOSITORY

TIMEOUT = 90.0
"""Seconds to wait for anything on a busy machine before a test fails."""


def eventually(condition: Callable[[], Any], what: str) -> Any:
    """Wait for the first true value of ``condition`` and return it."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.02)


class WorkerProcess:
    """``python -P -m workers`` on a free port. A context manager: nothing outlives the block."""

    def __init__(
        self,
        folder: Path,
        target: str,
        args: dict[str, Any] | None = None,
        *,
        port: int = 0,
        spec: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
        warnings: str = "error",
    ) -> None:
        document = {
            "model": {"target": target, "args": args or {}, "name": "test", **(model or {})},
            "path": [str(REPOSITORY)],
            **(spec or {}),
        }
        file = folder / f"spec-{time.monotonic_ns()}.json"
        file.write_text(json.dumps(document))
        self.spec_file = file
        command = [sys.executable, "-P", "-W", warnings, "-m", "workers"]
        command += ["--spec", str(file), "--id", "w1", "--port", str(port), "--device", "cpu"]
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(environment or {})},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""
        self.client = httpx.Client(timeout=TIMEOUT, trust_env=False)

    def __enter__(self) -> Self:
        try:
            match = eventually(self._ready, "a ready worker")
        except BaseException:
            self.__exit__()
            raise
        self.url = match[1]
        self.client.base_url = httpx.URL(self.url)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        assert self.process.stderr is not None
        self.process.stderr.close()

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def wait(self) -> int:
        """Wait for the exit code and the complete log."""
        code = self.process.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        return code

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def predict(self, value: Any, **options: Any) -> httpx.Response:
        return self.client.post("/predict", json=value, **options)

    def health(self) -> dict[str, Any]:
        report: dict[str, Any] = self.client.get("/health").json()
        return report

    def running_and_waiting(self) -> tuple[int, int]:
        """The numbers of running and of waiting requests."""
        report = self.health()
        return report["running"], report["waiting"]

    def metric(self, name: str, **labels: str) -> float:
        """Return the value of a series; 0 where it does not exist yet."""
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith(f"{name}{{") and all(
                f'{key}="{value}"' in line for key, value in labels.items()
            ):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def _ready(self) -> re.Match[str] | None:
        assert self.process.poll() is None, f"the worker ended: {self.log}"
        return re.search(r"ready url=(\S+)", self.log)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
