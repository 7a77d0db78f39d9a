"""The model's health report: refreshed after requests, never awaited by a client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.workers.harness import WorkerProcess, eventually


def reporting(folder: Path, **spec: Any) -> WorkerProcess:
    return WorkerProcess(
        folder, "tests.workers.models.plain:Reporting", {"hang": str(folder / "hang")}, spec=spec
    )


def test_report_is_refreshed_after_a_request(tmp_path: Path) -> None:
    with reporting(tmp_path) as worker:
        assert worker.health()["ran"] == 0
        for number in range(1, 8):
            assert worker.predict(number).status_code == 200
        eventually(lambda: worker.health()["ran"] == 7, "a report from after the last request")


def test_no_route_waits_for_health(tmp_path: Path) -> None:
    """health() would never come back: it is not called, and requests are served."""
    with reporting(tmp_path) as worker:
        (tmp_path / "hang").touch()
        for path in ("/health", "/longest_request", "/readyz", "/metrics", "/v1/models") * 3:
            assert worker.client.get(path).status_code == 200
        assert worker.predict(7).json() == 7


def test_hanging_health_exits_the_process(tmp_path: Path) -> None:
    with reporting(tmp_path, request_timeout=1.0) as worker:
        (tmp_path / "hang").touch()
        assert worker.predict(1).status_code == 200
        assert worker.health()["ran"] == 0
        assert worker.wait() == 1
        assert "has not returned" in worker.log
        assert "it was in: health" in worker.log


def test_health_that_finds_the_device_lost_exits_the_process(tmp_path: Path) -> None:
    module = tmp_path / "loses_its_device.py"
    module.write_text(
        "class Loses:\n"
        "    lost = False\n"
        "    def setup(self, device):\n        pass\n"
        "    def health(self):\n"
        "        if self.lost:\n"
        "            raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "        return {}\n"
        "    def predict(self, request):\n"
        "        self.lost = True\n"
        "        return request\n"
    )
    spec = {"path": [str(tmp_path)]}
    with WorkerProcess(tmp_path, "loses_its_device:Loses", spec=spec) as worker:
        assert worker.predict(1).json() == 1
        assert worker.wait() == 1
        assert "health() failed: RuntimeError: CUDA error" in worker.log
        assert "the device is lost" in worker.log
