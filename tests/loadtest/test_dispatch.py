"""The measuring of the serving layer: what it measures, and what it refuses to measure."""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path

import pytest

from launcher.config.settings import load
from loadtest import own_farm
from loadtest.dispatch_bench import main
from tests.loadtest.harness import StandIn, calls_of, fake_gpufarm
from tests.waiting import free_port

FEW = ("--workers", "1", "--concurrency", "2", "--service-ms", "1", "--seconds", "0.2")


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code, and the one line that is said instead of figures."""
    code = main([*FEW, *words])
    message = capsys.readouterr()
    assert message.out == ""
    assert message.err.count("\n") == 1, message.err
    return code, message.err


def test_no_farm_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = refused(["--host", f"http://127.0.0.1:{free_port()}"], capsys)
    assert code == 4
    assert "GPUFARM_MODEL__TARGET=loadtest.sleep_model:Sleep gpufarm up" in said


@pytest.mark.parametrize(
    ("way", "said"), [("ok", "answers, but has not slept"), ("absent", "answers 404")]
)
def test_another_model(way: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with StandIn(way) as farm:
        code, line = refused(["--host", farm.url], capsys)
    assert code == 1
    assert said in line
    assert "serves loadtest.sleep_model:Sleep" in line


def test_failed_requests_give_no_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = tmp_path / "s.csv"
    with StandIn("ok", "fail") as farm:
        words = ["--host", farm.url, "--path", "/work", "--csv", str(samples)]
        code, line = refused(words, capsys)
    assert code == 1
    assert "requests failed, most often with status 503; no figures" in line
    assert ",503," in samples.read_text(), "the samples are kept: they tell when it was"


def test_a_farm_that_goes_away(capsys: pytest.CaptureFixture[str]) -> None:
    with StandIn("ok", "cut") as farm:
        code, line = refused(["--host", farm.url, "--path", "/work"], capsys)
    assert code == 1
    assert "did not last to the end" in line


@pytest.mark.parametrize("words", [["--workers", "0"], ["--seconds", "no"], ["--workers"]])
def test_a_bad_argument_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main(words)
    assert ending.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_farm_of_a_run_serves_the_sleep_model_and_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpufarm(tmp_path, monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("GPUFARM_PORT", "1")
    monkeypatch.setenv("GPUFARM_TEST_KEPT", "")
    with own_farm.sleepers(20, print) as url:
        assert url == "http://127.0.0.1:1234"
        ((up, file),) = [(call[0], Path(call[2])) for call in calls_of(tmp_path)]
        assert up == "up"
        monkeypatch.delenv("GPUFARM_PORT")
        settings = load(file, {})
        assert settings.model.target == own_farm.SLEEP_MODEL
        assert (settings.workers.count, settings.workers.max) == (20, 20)
        assert Path(settings.state_dir).parent == file.parent
    assert [call[0] for call in calls_of(tmp_path)] == ["up", "down"]
    assert calls_of(tmp_path)[1][2] == str(file)
    assert not file.parent.exists()
    message = (tmp_path / "environment").read_text()
    assert "GPUFARM_" not in message, "what its caller has set is meant for another farm"


def test_a_terminated_run_stops_its_farm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpufarm(tmp_path, monkeypatch)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), own_farm.sleepers(1, print):
        signal.raise_signal(signal.SIGTERM)
    assert [call[0] for call in calls_of(tmp_path)] == ["up", "down"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_farm_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_gpufarm(tmp_path, monkeypatch, starts=False)
    assert main([*FEW]) == 3
    assert "`gpufarm up` failed" in capsys.readouterr().err.splitlines()[-1]
    assert [call[0] for call in calls_of(tmp_path)] == ["up", "down"], "nothing half started stays"


def test_the_command_is_the_one_beside_python() -> None:
    (first, *_) = own_farm.command()
    assert Path(first).parent == Path(sys.executable).parent
