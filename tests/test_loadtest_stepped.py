"""`python -m loadtest.stepped` from its start to its table, and its texts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from loadtest import farm, report, samples, stepped, texts
from tests.loadtest_harness import PATIENCE, ROOT, StandIn
from tests.waiting import free_port
from tests.workers_harness import WorkerProcess


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "loadtest.stepped"]
    return subprocess.run(
        [*command, "--results", str(folder), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_a_stepped_run_and_its_report(tmp_path: Path) -> None:
    steps = ("--steps", "1,3", "--seconds", "4", "--warm-up", "1", "--name", "r")
    paced = ("--loop", "open", "--arrivals", "15", "--max-failure-share", "0")
    with WorkerProcess(tmp_path, "tests.models.speech:Hum") as worker:
        done = run(tmp_path, "--host", worker.url, *steps, *paced)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "provider really used: not told" in done.stdout
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
        cwd=ROOT,
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


def fake_gpufarm(folder: Path, *, runs: bool, starts: bool = True) -> list[str]:
    """A command that notes how it is called, and answers as a farm's would."""
    program = folder / "gpufarm.py"
    program.write_text(
        f"""
import json, pathlib, sys
word = sys.argv[1]
with open({str(folder / "calls")!r}, "a") as calls:
    calls.write(word + "\\n")
if word == "ps" and not {runs} or word == "up" and not {starts}:
    sys.exit(4)
print(json.dumps({{"url": "http://127.0.0.1:1234", "workers": []}}))
"""
    )
    return [sys.executable, str(program)]


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
    command = fake_gpufarm(tmp_path, runs=runs)
    monkeypatch.setattr(stepped, "_command", lambda: command)
    with stepped._farm(stepped.parser().parse_args(words), Console()) as url:
        assert url == "http://127.0.0.1:1234"
    assert (tmp_path / "calls").read_text().split() == calls


def test_a_farm_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = fake_gpufarm(tmp_path, runs=False, starts=False)
    monkeypatch.setattr(stepped, "_command", lambda: command)
    assert stepped.main([]) == 1


def test_what_a_farm_tells() -> None:
    told = {"workers": [{"provider": "b"}, {"provider": "a"}, {"provider": "b"}, {}]}
    assert farm.named(told, "provider") == "a, b"
    assert farm.named({"workers": [{}]}, "provider") == "not told"
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
        ("[tiny]\nhello", r":1: \[tiny\] is none of short, medium, long"),
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
