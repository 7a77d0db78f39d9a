"""Real Locust processes against a real worker, and against a stand-in that misbehaves."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtest.arguments import add_to
from tests.loadtest.harness import PATIENCE, Run, StandIn, locust
from tests.waiting import free_port, until
from tests.workers.harness import WorkerProcess

AUDIO = "audio seconds made (RPS column: audio seconds per second)"
FACTOR = "real-time factor x 1000 (inference ms per audio second)"
WAITED = "real-time factor x 1000, waiting included (latency ms per audio second)"
PACED = ("--loop", "open", "--arrivals", 20)


@pytest.fixture(scope="module")
def hum(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    with WorkerProcess(tmp_path_factory.mktemp("hum"), "tests.workers.models.speech:Hum") as worker:
        yield worker


def test_a_run_reports_more_than_latency(hum: WorkerProcess, tmp_path: Path) -> None:
    limits = ("--max-latency-ms", 60000, "--max-failure-share", 0, "--max-real-time-factor", 100)
    words = ("-u", 2, "-r", 10, "-t", "3s", *PACED, *limits, "--stop-timeout", "30s")
    run = Run(tmp_path, hum.url, *words, "--csv", tmp_path / "l", "--html", tmp_path / "l.html")
    assert run.code == 0, run.log
    assert len(re.findall("threshold held", run.log)) == 3

    rows, stats = run.rows, run.stats
    assert rows
    assert {row["outcome"] for row in rows} == {"ok"}
    assert {row["worker"] for row in rows} == {"w1"}
    assert {row["step_users"] for row in rows} == {"2"}
    assert {row["text"] for row in rows} == {"short", "medium", "long"}
    requests = [entry for (kind, _), entry in stats.items() if kind == "POST"]
    assert sum(entry["num_requests"] for entry in requests) == len(rows)
    for name in ("queue time (ms)", "inference time (ms)", FACTOR, WAITED):
        assert stats["speech", name]["num_requests"] == len(rows)
    audio = sum(float(row["audio_seconds"]) for row in rows)
    assert audio - 1 < stats["speech", AUDIO]["num_requests"] <= audio
    inference = sum(float(row["inference_ms"]) for row in rows)
    assert stats["speech", "inference time (ms)"]["total_response_time"] == pytest.approx(inference)

    with (tmp_path / "l_stats.csv").open(newline="") as lines:
        table = {(row["Type"], row["Name"]): row for row in csv.DictReader(lines)}
    assert set(stats) <= set(table)
    assert AUDIO in (tmp_path / "l.html").read_text()


def test_streams_report_the_time_to_first_audio(hum: WorkerProcess, tmp_path: Path) -> None:
    words = ("-u", 1, "-t", "2s", "--text", "short", "--stop-timeout", "30s", *PACED)
    run = Run(tmp_path, hum.url, *words, "StreamingSpeechUser")
    assert run.code == 0, run.log
    assert all(float(row["first_byte_ms"]) <= float(row["latency_ms"]) for row in run.rows)
    # A tenth of a second for each character, counted from the bytes of the stream.
    for row in run.rows:
        assert float(row["audio_seconds"]) == pytest.approx(int(row["text_length"]) / 10)
    first = run.stats["stream", "time to first audio (ms)"]
    assert first["num_requests"] == len(run.rows)


def test_any_predict(tmp_path: Path) -> None:
    with WorkerProcess(tmp_path, "tests.workers.models.plain:Echo") as worker:
        words = ("-u", 1, "-t", "2s", "--predict-body", '{"a": [1, 2]}', "--request", "predict")
        run = Run(tmp_path, worker.url, *words, *PACED, "--stop-timeout", "30s")
    assert run.code == 0, run.log
    assert {row["kind"] for row in run.rows} == {"predict"}
    assert {row["answer_bytes"] for row in run.rows} == {str(len('{"echo":{"a":[1,2]}}'))}
    assert ("predict", AUDIO) not in run.stats


def test_refused_is_not_failed_and_failures_have_a_reason(tmp_path: Path) -> None:
    with StandIn("ok", "refuse", "fail", "json", "cut", "silent") as farm:
        words = ("-u", 1, "-t", "2s", "--stop-timeout", "30s", "--arrivals", 30, "--loop", "open")
        run = Run(tmp_path, farm.url, *words, "--max-failure-share", 0.9)
        assert run.code == 0, "as many failures as --max-failure-share allows"
        counted = Counter(row["outcome"] for row in run.rows)
        refused = run.stats["speech", "refused, 429 (ms until the response)"]
        assert refused["num_requests"] == counted["refused"] > 0
        assert refused["num_failures"] == 0
        posts = [entry for (kind, _), entry in run.stats.items() if kind == "POST"]
        assert sum(e["num_requests"] for e in posts) == counted["ok"] + counted["failed"]
        assert sum(e["num_failures"] for e in posts) == counted["failed"]
        errors = {row["error"] for row in run.rows} - {""}
        assert "503 no_worker" in errors
        assert "the answer is application/json, not audio" in errors
        assert "the answer holds no audio" in errors
        assert any(error.startswith("200, then cut off") for error in errors), errors
        assert len(errors) == 4

        limits = ("--max-failure-share", 0.9, "--max-refused-share", 0.01)
        run = Run(tmp_path, farm.url, "-u", 1, "-t", "1s", *limits, *PACED)
        assert run.code == 1
        assert "threshold held: share of failed requests" in run.log
        assert "threshold EXCEEDED: share of refused requests" in run.log


def test_a_run_without_a_server_fails(tmp_path: Path) -> None:
    words = ("-u", 1, "-t", "1s", "--max-latency-ms", 1000)
    run = Run(tmp_path, f"http://127.0.0.1:{free_port()}", *words)
    assert run.code == 1
    assert "EXCEEDED: p95 of latency in ms nothing measured" in run.log
    # A caller that cannot connect does not try in a tight loop.
    assert 0 < len(run.rows) < 20
    assert {row["status"] for row in run.rows} == {"0"}


def test_a_host_that_is_no_address(tmp_path: Path) -> None:
    run = Run(tmp_path, "127.0.0.1:8000", "-t", "5s")
    assert run.code == 2
    assert "--host is '127.0.0.1:8000'; the farm's address is needed" in run.log


def test_a_slow_farm_does_not_slow_the_arrivals(tmp_path: Path) -> None:
    """It serves 5 a second, 20 arrive: the later one arrives, the longer it waits."""
    with StandIn("slow", seconds=0.2) as farm:
        words = ("-u", 1, "-t", "3s", *PACED, "--stop-timeout", "1s", "--max-latency-ms", 300)
        run = Run(tmp_path, farm.url, *words)
    assert run.code == 1, "the threshold sees the waiting"
    rows = sorted(run.rows, key=lambda row: float(row["scheduled"]))
    gaps = [
        float(after["scheduled"]) - float(row["scheduled"])
        for row, after in itertools.pairwise(rows)
    ]
    assert gaps == pytest.approx([0.05] * len(gaps), abs=1e-4)
    span = float(rows[-1]["scheduled"]) - float(rows[0]["scheduled"])
    assert len(rows) == pytest.approx(20 * span + 1, abs=1)
    counted = Counter(row["outcome"] for row in rows)
    assert counted["ok"] < len(rows) / 2
    # What was unanswered at the end is counted: it waited the longest.
    unfinished = run.stats["speech", "unfinished when the run ended (ms waited so far)"]
    assert unfinished["num_requests"] == counted["unfinished"] > 0
    waited = [float(row["latency_ms"]) for row in rows if row["outcome"] == "ok"]
    assert waited[-1] > 3 * waited[0]


def test_distributed_statistics_come_together(hum: WorkerProcess, tmp_path: Path) -> None:
    port = free_port()
    words: tuple[object, ...] = ("--master", "--master-bind-host", "127.0.0.1")
    words += ("--master-bind-port", port, "--headless", "--expect-workers", 2, "--host", hum.url)
    words += ("--steps", "2,4", "--step-seconds", 2, "--loop", "open", "--arrivals", 5)
    words += ("--stop-timeout", "20s", "--samples", tmp_path / "s.csv", "--only-summary")
    words += ("--json-file", tmp_path / "stats", "--max-failure-share", 0)
    worker = ("--worker", "--master-host", "127.0.0.1", "--master-port", port)
    with (
        locust(tmp_path, *words) as master,
        locust(tmp_path, *worker) as one,
        locust(tmp_path, *worker) as other,
    ):
        assert master.wait(PATIENCE) == 0
        assert one.wait(PATIENCE) == 0
        assert other.wait(PATIENCE) == 0
    stats = {entry["name"]: entry for entry in json.loads((tmp_path / "stats.json").read_text())}
    with (tmp_path / "s.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    # 2 users and then 4, five times a second, two seconds each: 60, give or take the edges.
    assert len(rows) > 40
    assert {row["step_users"] for row in rows} == {"2", "4"}
    answered = sum(row["outcome"] == "ok" for row in rows)
    assert answered == stats["queue time (ms)"]["num_requests"]
    assert answered == sum(e["num_requests"] for e in stats.values() if e["method"] == "POST")
    audio = sum(float(row["audio_seconds"]) for row in rows if row["outcome"] == "ok")
    assert audio - 2 < stats[AUDIO]["num_requests"] <= audio


def test_the_page_shows_arguments_and_statistics(hum: WorkerProcess, tmp_path: Path) -> None:
    port = free_port()
    words = ("--web-host", "127.0.0.1", "--web-port", port, "--host", hum.url)
    page = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=PATIENCE)
    with page, locust(tmp_path, *words) as process:
        index = until(lambda: page.get("/"), "Locust's page", PATIENCE).text
        for argument in ("loop", "arrivals", "text", "steps", "max_latency_ms", "predict_body"):
            assert f'"{argument}"' in index
        assert '"samples"' not in index, "a page that names files to write would be a hole"
        form = {"user_count": 1, "spawn_rate": 1, "host": hum.url, "text": "short"}
        form |= {"steps": "3,5", "step_seconds": 60, "max_latency_ms": "", "arrivals": "20"}
        form |= {"loop": "open"}
        assert page.post("/swarm", data=form).json()["success"]

        def names() -> dict[str, Any]:
            message = page.get("/stats/requests").json()
            stats = {entry["name"]: entry for entry in message["stats"]}
            return stats if message["user_count"] == 3 and AUDIO in stats else {}

        stats = until(names, "the statistics of the first step", PATIENCE)
        assert "/v1/audio/speech, short text" in stats
        assert "/v1/audio/speech, long text" not in stats
        assert WAITED in stats
        assert page.post("/stop").json()["success"]
        # Without steps, it is Locust's own number of users again.
        assert page.post("/swarm", data={**form, "steps": ""}).json()["success"]
        until(lambda: page.get("/stats/requests").json()["user_count"] == 1, "1 user", PATIENCE)
        process.terminate()
        assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--steps", "1,two"), "'1,two' must be a list of numbers of users"),
        (("--arrivals", "0"), "'0' must be a number above 0"),
        (("--max-latency-ms", "soon"), "'soon' must be a number of 0 or more"),
        (("--predict-body", "{"), "'{' is not JSON"),
    ],
)
def test_a_bad_argument_is_one_line(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser(prog="locust")
    add_to(parser)
    with pytest.raises(SystemExit) as ending:
        parser.parse_args(words)
    assert ending.value.code == 2
    assert said in capsys.readouterr().err
