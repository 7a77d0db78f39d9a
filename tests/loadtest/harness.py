"""Real Locust processes, and a farm's stand-in that answers as badly as a test wants."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from loadtest import own_farm
from tests.repository import REPOSITORY

PATIENCE = 90.0
"""Seconds that anything may take on a busy machine before a test gives up."""


def locust_command(*words: object) -> list[str]:
    file = str(REPOSITORY / "loadtest" / "locustfile.py")
    return [sys.executable, "-P", "-m", "locust", "-f", file, *map(str, words)]


class Run:
    """A headless run that has ended."""

    def __init__(self, folder: Path, url: str, *words: object) -> None:
        command = locust_command("--headless", "--host", url, "--only-summary")
        command += ["--samples", str(folder / "s.csv"), "--json-file", str(folder / "stats")]
        done = subprocess.run(
            [*command, *map(str, words)],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        self.code = done.returncode
        self.log = done.stdout + done.stderr
        self.folder = folder

    @property
    def rows(self) -> list[dict[str, str]]:
        with (self.folder / "s.csv").open(newline="") as lines:
            return list(csv.DictReader(lines))

    @property
    def stats(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Locust's own statistics, by type and name."""
        entries = json.loads((self.folder / "stats.json").read_text())
        return {(entry["method"], entry["name"]): entry for entry in entries}


@contextmanager
def locust(folder: Path, *words: object) -> Iterator[subprocess.Popen[str]]:
    """A Locust process that is killed at the latest when the block ends."""
    with (folder / f"locust-{time.monotonic_ns()}.log").open("w") as log:
        process = subprocess.Popen(
            locust_command(*words),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            text=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(PATIENCE)


def fake_gpufarm(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    runs: bool = False,
    starts: bool = True,
    none_runs: int = 4,
) -> None:
    """In place of `gpufarm`: notes how it is called, and answers as a farm's command would."""
    program = folder / "fake_gpufarm.py"
    program.write_text(
        f"""
import json, os, pathlib, sys
folder = pathlib.Path({str(folder)!r})
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
(folder / "environment").write_text("\\n".join(os.environ))
word = sys.argv[1]
if word == "ps" and not {runs}:
    sys.exit({none_runs})
if word == "up" and not {starts}:
    sys.exit(3)
if word != "down":
    print(json.dumps({{"url": "http://127.0.0.1:1234", "workers": []}}))
"""
    )
    monkeypatch.setattr(own_farm, "command", lambda: [sys.executable, str(program)])


def calls_of(folder: Path) -> list[list[str]]:
    """The words of each call of the fake command in ``folder``."""
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


class _Answers(BaseHTTPRequestHandler):
    """One way to answer after the other, over and over."""

    protocol_version = "HTTP/1.1"
    server: StandIn

    def do_GET(self) -> None:
        self._send(200, "application/json", b'{"status": "ready", "id": "w1"}')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        way = self.server.next_way()
        if way == "slow":
            with self.server.serial:
                time.sleep(self.server.seconds)
        if way in ("ok", "slow"):
            self._send(200, "audio/wav", b"RIFF", {"X-Audio-Seconds": "1.5", "X-Worker-Id": "w1"})
        elif way == "refuse":
            self._send(429, "application/json", b"{}", {"Retry-After": "0.01"})
        elif way == "fail":
            body = {"error": {"message": "no worker is here", "code": "no_worker"}}
            self._send(503, "application/json", json.dumps(body).encode())
        elif way == "absent":
            body = {"error": {"message": "There is no such path here.", "code": "not_found"}}
            self._send(404, "application/json", json.dumps(body).encode())
        elif way == "json":
            self._send(200, "application/json", b"{}")
        elif way == "cut":
            self._send(200, "audio/wav", b"RIFF", {"Content-Length": "1000"})
            self.close_connection = True
        elif way == "silent":
            self._send(200, "audio/wav", b"")
        else:
            raise AssertionError(way)

    def _send(
        self, status: int, content_type: str, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        sent = {"Content-Type": content_type, "Content-Length": str(len(body)), **(headers or {})}
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class StandIn(ThreadingHTTPServer):
    """Answers speech requests in the given ways, in turn. A context manager."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *ways: str, seconds: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.seconds = seconds
        self.serial = threading.Lock()
        self._ways, self._index = ways, 0
        self._turn = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def next_way(self) -> str:
        with self._turn:
            self._index += 1
            return self._ways[(self._index - 1) % len(self._ways)]

    def handle_error(self, *_: Any) -> None:
        """A caller that leaves is no error of the stand-in."""

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join(PATIENCE)
        self.server_close()
