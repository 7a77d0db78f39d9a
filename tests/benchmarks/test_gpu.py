"""The GPU benchmark on a machine without a GPU: its logic, its processes, its failures."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.gpu import report, scaling
from benchmarks.gpu.job import BenchmarkError, Job, Outcome, Row
from benchmarks.gpu.pool import WorkerProcess, worker_pool
from benchmarks.gpu.section import run_section
from tests.repository import REPOSITORY
from tests.training import toy_voice
from tests.waiting import until

WITHOUT_A_REGISTRY = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"num2words", "soundfile", "starlette", "uvicorn"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""
"""Makes a Python that lacks the packages of a server."""


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_voice.write(tmp_path_factory.mktemp("voice"))


def benchmark(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def processes_of(folder: Path) -> list[list[str]]:
    """Return the commands of the processes that work in this test's folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if any(str(folder) in word for word in command):
            found.append(command)
    return found


def a_job(folder: Path, voice: Path) -> Job:
    return Job(device="cpu", weights=str(voice), logs=str(folder), quick=True)


@pytest.mark.parametrize(
    "module",
    [
        *(f"workers.models.voice.{name}" for name in ("decoding", "weights", "speech")),
        *("benchmarks.gpu.__main__", "benchmarks.fidelity"),
    ],
)
def test_the_decoder_imports_no_server_and_no_audio_library(module: str) -> None:
    program = (
        f"{WITHOUT_A_REGISTRY}\nimport {module}\n"
        "from workers.models.voice.text import normalise\n"
        "print(normalise('Nothing but words.'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "nothing but words."


@pytest.mark.timeout(420)
def test_every_section_for_a_cpu_passes(tmp_path: Path, voice: Path) -> None:
    done = benchmark("--out", tmp_path, "--weights", voice, "--device", "cpu", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(tmp_path)
    names = ["speed", "bandwidth", "footprint", "workers"]
    assert [section["name"] for section in found["sections"]] == names
    assert found["environment"]["torch"] == torch.__version__

    modes = [row["mode"] for row in found["tables"]["speed"]]
    assert modes == ["eager", "graph"] * 2
    for row in found["speeds"]:
        assert row["bytes_per_second"] == row["frames_per_second"] * row["bytes_per_frame"]
        assert row["share_of_bandwidth"] > 0
        assert row["copy_bytes_per_second"] > 0

    counted = {(row["workers"], row["pinned"]) for row in found["tables"]["workers"]}
    assert {(1, False), (2, False)} <= counted
    with (tmp_path / "requests.csv").open() as opened:
        requests = list(csv.DictReader(opened))
    assert len(requests) == found["only_in_csv"]["requests"]
    assert len(requests) == sum(row["requests"] for row in found["tables"]["workers"])
    assert {row["worker"] for row in requests} == {"1", "2"}

    first, second = found["tables"]["footprint"]
    assert first["peak"] >= first["steady"] > 10**7
    assert second["samples"] > 0
    assert first["torch_reserved"] is None  # torch has no allocator of its own for a CPU
    (codec,) = found["tables"]["codec"]
    assert codec["provider"] == "cpu"
    table = (tmp_path / "table.txt").read_text()
    assert table in done.stdout
    assert "NO" not in table.split()
    assert not processes_of(tmp_path)


@pytest.mark.timeout(300)
def test_a_failed_section_is_reported_and_the_others_run(tmp_path: Path) -> None:
    weights, out = tmp_path / "nowhere", tmp_path / "out"
    done = benchmark(
        *("--out", out, "--device", "cpu", "--quick"),
        *("--weights", weights, "--only", "speed", "bandwidth", "workers"),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    sections = {section["name"]: section for section in results(out)["sections"]}
    assert list(sections) == ["speed", "bandwidth", "workers"]
    assert str(weights) in sections["speed"]["reason"]
    assert "voice-worker-1 exited with code 1" in sections["workers"]["reason"]
    assert sections["bandwidth"]["passed"]
    assert len(results(out)["tables"]["bandwidth"]) == 3
    assert "FAILED: WeightsError" in done.stdout
    assert "not measured" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_machine_without_a_gpu_gets_a_one_line_error(tmp_path: Path) -> None:
    done = benchmark("--out", tmp_path / "out", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "needs a CUDA device" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_section_past_its_deadline_is_stopped_with_its_workers(
    tmp_path: Path, voice: Path
) -> None:
    job = a_job(tmp_path, voice)
    outcome = run_section("late", "workers", job, 3.0, os.environ)
    assert outcome.reason == "not finished within 3 s"
    assert not processes_of(tmp_path)


def test_a_section_after_the_total_deadline_is_not_started(tmp_path: Path) -> None:
    done = benchmark(
        *("--out", tmp_path, "--device", "cpu", "--quick"),
        *("--only", "bandwidth", "--seconds", 0.5),
    )
    assert done.returncode == 1
    assert "not started" in results(tmp_path)["sections"][0]["reason"]


def test_sigterm_stops_the_benchmark_and_its_workers(tmp_path: Path, voice: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)]
    command += ["--weights", str(voice), "--device", "cpu", "--quick"]
    command += ["--only", "bandwidth", "workers"]
    log = tmp_path / "logs" / "voice-worker-1.log"
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL) as process:
        try:
            until(log.exists, "a worker")
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 128 + signal.SIGTERM
        finally:
            process.kill()
    assert not processes_of(tmp_path)
    assert [section["name"] for section in results(tmp_path)["sections"]] == ["bandwidth"]
    assert "bandwidth" in (tmp_path / "table.txt").read_text()


def test_a_section_exits_when_the_benchmark_is_killed(tmp_path: Path, voice: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)]
    command += ["--weights", str(voice), "--device", "cpu", "--quick", "--only", "workers"]
    log = tmp_path / "logs" / "voice-worker-1.log"
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL) as process:
        until(log.exists, "a worker")
        process.kill()
    until(lambda: not processes_of(tmp_path), "the exit of all its processes")


def test_a_worker_that_exits_is_reported_with_its_stderr_tail(tmp_path: Path, voice: Path) -> None:
    worker = WorkerProcess("the-odd-one", "unheard-of", a_job(tmp_path, voice))
    try:
        with pytest.raises(BenchmarkError, match=r"the-odd-one exited with code 1: .*unheard-of"):
            worker.wait_ready()
    finally:
        worker.close()


def test_waiting_for_a_silent_worker_times_out(tmp_path: Path, voice: Path) -> None:
    with worker_pool("voice", a_job(tmp_path, voice), "silent") as workers:
        workers.members.append(WorkerProcess("silent", "voice", workers.job))
        with pytest.raises(BenchmarkError, match="silent did not respond within"):
            workers.members[0].receive(0.01)
    assert not processes_of(tmp_path)


def test_rates_count_requests_that_ended_while_all_workers_ran() -> None:
    requests = [(10.0, 1.0, 5), (11.0, 1.0, 5), (12.0, 0.5, 5)]
    assert scaling.rate(requests, end=12.2) == 5.0
    assert scaling.rate(requests, end=13.0) == 15 / 2.5
    assert scaling.rate(requests, end=10.5) == 5.0  # nothing had ended: the first alone


def test_quantiles_are_measured_values() -> None:
    values = [float(n) for n in range(1, 101)]
    assert scaling.quantile(values, 0.5) == 50
    assert scaling.quantile(values, 0.95) == 95
    assert scaling.quantile([3.0], 0.95) == 3


def test_the_share_of_bandwidth_needs_speed_and_bandwidth() -> None:
    row: Row = {"table": "speed", "model": "voice", "mode": "graph", "engine": "cuda-graph"}
    row |= {"frames_per_second": 100.0, "codes_per_second": 700.0, "bytes_per_frame": 5e6}
    copied = {"table": "bandwidth", "bytes_per_second": 1e9}
    both = report.by_table([Outcome("a", rows=[row, copied])])
    assert report.speeds(both)[0]["share_of_bandwidth"] == 0.5
    alone = report.by_table([Outcome("a", rows=[row]), Outcome("b", reason="no device")])
    assert report.speeds(alone)[0]["share_of_bandwidth"] is None
    text = report.text({}, [Outcome("a", rows=[row]), Outcome("b", reason="no device")])
    assert "FAILED: no device" in text
