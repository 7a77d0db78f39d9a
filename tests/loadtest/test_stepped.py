"""`python -m loadtest.stepped` from its start to its table, and its texts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from loadtest import farm, report, samples, stepped, texts
from tests.loadtest.harness import PATIENCE, StandIn, calls_of, fake_gpufarm
from tests.repository import REPOSITORY
from tests.waiting import free_port
from tests.workers.harness import WorkerProcess


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "loadtest.stepped"]
    return subprocess.run(
        [*command, "--results", str(folder), *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_a_stepped_run_and_its_report(tmp_path: Path) -> None:
    steps = ("--steps", "1,3", "--seconds", "4", "--warm-up", "1", "--name", "r")
    paced = ("--loop", "open", "--arrivals", "15", "--max-failure-share", "0")
    with WorkerProcess(tmp_path, "tests.workers.models.speech:Hum") as worker:
        done = run(tmp_path, "--host", worker.url, *steps, *paced)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "provider really used: not reported" in done.stdout
    assert "device cpu" in done.stdout
    assert "warm-up, not counted" in done.stdout
    folder = tmp_path / "r"
    assert (folder / "locust.html").stat().st_size > 10_000

    rows = samples.read(folder / report.SAMPLES)
    assert {row.step_users for row in rows} == {1, 3}
    warm = samples.read(folder / report.WARM_UP)
    assert max(row.scheduled for row in warm) < min(row.scheduled for row in rows)
    stored = json.loads((folder / report.SUMMARY).read_text())
    assert stored["farm"]["workers"][0]["id"] == "w1"
    first, second = stored["summary"]["steps"]
    assert first["requests_per_second"] == pytest.approx(15, rel=0.25)
    assert second["requests_per_second"] == pytest.approx(45, rel=0.25)

    again = subprocess.run(
        [sys.executable, "-W", "error", "-m", "loadtest.report", str(folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    table = [line for line in again.stdout.splitlines() if line.lstrip().startswith("total")]
    assert table == [line for line in done.stdout.splitlines() if line.lstrip().startswith("total")]


def test_no_farm_there(tmp_path: Path) -> None:
    done = run(tmp_path, "--host", f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1
    assert "`gpufarm up` starts one" in done.stderr


@pytest.mark.parametrize(
    ("runs", "words", "calls"),
    [
        (True, [], ["ps"]),
        (False, [], ["ps", "up", "down"]),
        (False, ["--keep"], ["ps", "up"]),
    ],
)
def test_whose_farm_it_is(
    runs: bool, words: list[str], calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpufarm(tmp_path, monkeypatch, runs=runs)
    with stepped._farm(stepped.parser().parse_args(words), Console()) as url:
        assert url == "http://127.0.0.1:1234"
    assert [call[0] for call in calls_of(tmp_path)] == calls


def test_a_farm_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpufarm(tmp_path, monkeypatch, starts=False)
    assert stepped.main(["--keep", "--results", str(tmp_path / "results")]) == 3
    assert [call[0] for call in calls_of(tmp_path)] == ["ps", "up", "down"]
    assert not (tmp_path / "results").exists()


def test_a_farm_of_which_nothing_is_known_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpufarm(tmp_path, monkeypatch, none_runs=1)
    assert stepped.main(["--results", str(tmp_path / "results")]) == 1
    assert {call[0] for call in calls_of(tmp_path)} == {"ps"}


def test_failures_and_thresholds_are_one_line_each(tmp_path: Path) -> None:
    words = ("--steps", "1", "--seconds", "2", "--warm-up", "1", "--name", "r")
    paced = ("--loop", "open", "--arrivals", "20", "--request", "stream")
    limits = ("--max-latency-ms", "0.0001", "--max-refused-share", "0.5")
    with StandIn("ok", "absent", "absent", "fail") as server:
        done = run(tmp_path, "--host", server.url, *words, *paced, *limits)
    assert done.returncode == 1, done.stdout + done.stderr
    failures, latency = done.stderr.splitlines()
    rows = samples.read(tmp_path / "r" / report.SAMPLES)
    failed = [row for row in rows if row.outcome == samples.FAILED]
    assert failures == (
        f"stepped: {len(failed)} of {len(rows)} requests failed, most often: 404 not_found; "
        "for a model with predict() use --request predict"
    )
    total = json.loads((tmp_path / "r" / report.SUMMARY).read_text())["summary"]["total"]
    assert latency == (
        f"stepped: threshold EXCEEDED: p95 of latency in ms {total['latency_ms']['p95']:.4g}, "
        "limit 0.0001 (--max-latency-ms)"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--steps", ""), "argument --steps: must not be empty; list numbers of users"),
        (("--steps", "1,0"), "'1,0' must be a list of numbers of users"),
        (("--text", "huge"), "argument --text: invalid choice: 'huge'"),
        (("--arrivals", "0"), "'0' must be a number above 0"),
        (("--predict-body", "{"), "'{' is not JSON"),
        (("--texts", "nowhere.txt"), "nowhere.txt: cannot be read"),
    ],
)
def test_a_bad_argument_is_one_line_and_leaves_nothing(
    words: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = stepped.main(["--results", str(tmp_path / "results"), *words])
    except SystemExit as ending:
        code = ending.code
    assert code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert said in message
    assert not (tmp_path / "results").exists()


def test_a_farms_health_is_summarised() -> None:
    health = {"workers": [{"provider": "b"}, {"provider": "a"}, {"provider": "b"}, {}]}
    assert farm.named(health, "provider") == "a, b"
    assert farm.named({"workers": [{}]}, "provider") == "not reported"
    with StandIn("ok") as server:
        described = farm.describe(server.url)
    assert described["workers"][0]["id"] == "w1"
    with pytest.raises(farm.NoFarmError):
        farm.describe("nonsense")


def test_texts_of_every_length() -> None:
    groups = texts.load(texts.OWN_FILE)
    lengths = {name: [len(text) for text in group] for name, group in groups.items()}
    assert max(lengths["short"]) < 40 < min(lengths["medium"])
    assert max(lengths["medium"]) < 120 < min(lengths["long"])
    assert max(lengths["long"]) < 4096, "as much as OpenAI's contract takes"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("hello", ":1: a text before the first heading"),
        ("[tiny]\nhello", r":1: \[tiny\] is not a group; use one of short, medium, long"),
        ("[short]\na\n[long]\nb", r"no texts under \[medium\]"),
    ],
)
def test_bad_texts(content: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text(content)
    with pytest.raises(texts.TextsError, match=said):
        texts.load(file)
    with pytest.raises(texts.TextsError, match="cannot be read"):
        texts.load(tmp_path / "absent.txt")
