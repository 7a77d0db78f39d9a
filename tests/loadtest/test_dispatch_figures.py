"""The measuring of the serving layer, on made-up samples and against a server of known times."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.dispatch_bench import added, main, percentile, share
from loadtest.keepalive_client import Sample
from tests.repository import REPOSITORY
from tests.waiting import free_port, listens, until

STANDIN = REPOSITORY / "tests" / "standin.py"


def sample(start: float, latency: float, inference: float | None = None) -> Sample:
    return Sample(start, latency, 200, "w1", None, inference)


def test_added_is_what_lies_beyond_the_service_time() -> None:
    figures = added([sample(0, 0.021, 0.0201), sample(0, 0.022, 0.0201), sample(0, 0.030)], 0.020)
    assert figures["added_ms_p50"] == pytest.approx(2)
    assert figures["added_ms_p99"] == pytest.approx(9.84)
    assert figures["added_beyond_inference_ms_p50"] == pytest.approx(1.4)


def test_share_of_workers_that_never_idle_is_one() -> None:
    samples = [sample(0.02 * n + 0.005 * w, 0.02) for n in range(500) for w in range(4)]
    figures = share(samples, workers=4, service=0.020)
    assert figures["share"] == pytest.approx(1, abs=0.01)
    assert share(samples, workers=8, service=0.020)["share"] == pytest.approx(0.5, abs=0.01)


def test_percentiles() -> None:
    assert percentile([3, 1, 2], 50) == 2
    assert percentile([0, 10], 99) == pytest.approx(9.9)
    assert percentile([5], 99) == 5


def test_against_a_server_of_one_worker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port, samples = free_port(), tmp_path / "samples.csv"
    process = subprocess.Popen([sys.executable, str(STANDIN), "--port", str(port)])
    try:
        until(lambda: listens(port), "the server listens")
        arguments = ["--host", f"http://127.0.0.1:{port}", "--path", "/work?seconds=0.02"]
        arguments += ["--workers", "1", "--concurrency", "3", "--seconds", "1"]
        assert main([*arguments, "--csv", str(samples)]) == 0
    finally:
        process.terminate()
        process.wait(20)
    figures = json.loads(capsys.readouterr().out)
    assert figures["failed"] == 0
    assert 0.3 < figures["share"] < 1.01
    with samples.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == figures["requests"]
    assert {row["run"] for row in rows} == {"alone", "full"}
