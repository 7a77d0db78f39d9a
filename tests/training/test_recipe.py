"""The errors of training steps: one line, and an exit code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.waiting import free_port
from training import recipe

Captured = pytest.CaptureFixture[str]


def line_of(
    step: str, words: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, captured: Captured
) -> tuple[object, str]:
    """Run a step in this process; return its exit code and its one line on standard error."""
    monkeypatch.setattr(sys, "argv", [step, *map(str, words)])
    with pytest.raises(SystemExit) as ending:
        importlib.import_module(f"training.{step}").main()
    printed = captured.readouterr()
    assert printed.err.count("\n") == 1, printed.err
    return ending.value.code, printed.err


@pytest.mark.parametrize(
    ("step", "missing", "maker"),
    [
        ("features", "corpus", "step 1 makes it: python -m training.corpus"),
        ("lexicon", "corpus", "step 1 makes it: python -m training.corpus"),
        ("quantiser", "features.npz", "step 2 makes it: python -m training.features"),
        ("codec_decoder", "quantiser.safetensors", "step 4 makes it: python -m training.quantiser"),
        ("dual_ar", "codes.npz", "step 4 makes it: python -m training.quantiser"),
        ("pack", "quantiser.safetensors", "step 4 makes it: python -m training.quantiser"),
    ],
)
def test_a_step_names_the_step_that_makes_a_missing_file(
    step: str,
    missing: str,
    maker: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    data = ("--data", tmp_path / "data") if step in ("lexicon", "pack") else ()
    code, line = line_of(step, ("--out", tmp_path, *data), monkeypatch, capsys)
    assert code == 1
    assert f"{tmp_path / missing} is missing; {maker} --out {tmp_path}\n" in line
    assert list(tmp_path.iterdir()) == [], "a step that did nothing leaves nothing"


def test_g2p_needs_the_lexicon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    words = ("--out", tmp_path / "out", "--data", tmp_path)
    code, line = line_of("g2p", words, monkeypatch, capsys)
    assert code == 1
    assert "lexicon.txt.gz is missing; step 3 makes it" in line
    assert f"training.lexicon --data {tmp_path}" in line


def test_an_incomplete_file_of_a_killed_step_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    file = tmp_path / "features.npz"
    np.savez(file, mel=np.zeros(1000))
    file.write_bytes(file.read_bytes()[:500])
    code, line = line_of("quantiser", ("--out", tmp_path), monkeypatch, capsys)
    assert code == 1
    assert "features.npz is incomplete; step 2 makes it" in line


@pytest.fixture
def threads() -> Iterator[None]:
    """The evaluation sets them for its whole process, which is this one here."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_an_evaluation_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    unused = f"http://127.0.0.1:{free_port()}"
    out = ("--out", tmp_path / "out")
    code, line = line_of("evaluate", (*out, "--url", unused), monkeypatch, capsys)
    assert code == 4
    assert f"no farm responds at {unused}" in line
    assert "`gpufarm up` starts one" in line
    words = (*out, "--url", unused, "--codec", tmp_path / "voice")
    code, line = line_of("evaluate", words, monkeypatch, capsys)
    assert code == 1
    assert "quantiser.safetensors is missing; step 4 makes it" in line
    code, line = line_of("evaluate", ("--temperature", "nan"), monkeypatch, capsys)
    assert code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("threads")
def test_an_evaluation_does_not_depend_on_the_number_of_cores(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    evaluate = importlib.import_module("training.evaluate")

    def speaker(*_: object) -> None:
        raise recipe.StepError(f"speaks with {torch.get_num_threads()} threads")

    torch.set_num_threads(2)
    monkeypatch.setattr(evaluate, "voice_speaker", speaker)
    _, line = line_of("evaluate", (), monkeypatch, capsys)
    assert "speaks with 1 threads" in line


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (FileNotFoundError(2, "No such file", "t2p"), 1, "t2p is missing; install it: apt-get"),
        (FileNotFoundError(2, "No such file", "/x/american-english"), 1, "install wamerican"),
        (PermissionError(13, "Permission denied", "/x"), 1, "/x: Permission denied"),
        (recipe.StepError("no", 2), 2, ": no"),
        (LookupError("as expected"), 1, ": as expected"),
    ],
)
def test_an_error_that_a_user_can_fix_is_one_line(
    error: Exception, code: int, said: str, capsys: Captured
) -> None:
    @recipe.step(LookupError)
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ending:
        main()
    assert ending.value.code == code
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert said in line


def test_a_bug_is_not_hidden() -> None:
    @recipe.step()
    def main() -> None:
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        main()


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("corpus", ("--sentences", 0)),
        ("features", ("--processes", "two")),
        ("dual_ar", ("--batch", -1)),
    ],
)
def test_a_bad_argument_is_one_line(
    step: str, words: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    code, line = line_of(step, words, monkeypatch, capsys)
    assert code == 2
    assert f"argument {words[0]}: must be" in line
    assert f"got '{words[1]}'" in line
