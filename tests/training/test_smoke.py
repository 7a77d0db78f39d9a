"""The voice's whole recipe on a toy corpus: every command runs, and the result speaks."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.repository import REPOSITORY
from tests.waiting import until
from training.corpus import FORTUNES, WORDS
from workers.model.contract import SpeechRequest
from workers.models.voice import Voice, weights

MISSING = [
    *(f"the program {name} (Debian: flite)" for name in ("flite", "t2p") if not shutil.which(name)),
    *([] if FORTUNES.is_dir() else [f"{FORTUNES} (Debian: fortunes)"]),
    *([] if WORDS.is_file() else [f"{WORDS} (Debian: wamerican)"]),
]
pytestmark = [
    pytest.mark.training,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(MISSING), reason=f"a voice is not trained without {MISSING}"),
]


class Recipe:
    """The commands of training/README.md, small enough for a test."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.data = out / "data"

    def start(self, step: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", f"training.{step}", "--out", self.out, *arguments]
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, step: str, *arguments: object) -> str:
        with self.start(step, *arguments) as process:
            try:
                printed, _ = process.communicate(timeout=120)
            finally:
                process.kill()
        assert process.returncode == 0, f"training.{step}:\n{printed}"
        return printed


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Run the steps up to the codes, which the decoder learns from."""
    recipe = Recipe(tmp_path_factory.mktemp("voice"))
    assert "48 of 48 sentences" in recipe.run("corpus", "--sentences", 48)
    assert "48 sentences" in recipe.run("features", "--processes", 1)
    recipe.run("lexicon", "--data", recipe.data, "--words", 400)
    assert "of 48 sentences" in recipe.run("quantiser", "--rounds", 2)
    return recipe


@dataclass(frozen=True)
class Interrupted:
    reached: int
    """The last step that the killed training reported."""
    resumed: str
    """Output of the same command, run again."""


@pytest.fixture(scope="module")
def interrupted(recipe: Recipe) -> Interrupted:
    """The decoder's training is killed after a checkpoint, and goes on for a step."""
    few = ("--batch", 4, "--held-back", 8, "--every")
    checkpoint = recipe.out / "dual_ar.pt"
    with recipe.start("dual_ar", *few, 2, "--steps", 100_000) as process:
        try:
            until(
                lambda: checkpoint.exists() or process.poll() is not None,
                "a checkpoint",
                seconds=120,
            )
        finally:
            process.kill()  # SIGKILL: nothing is tidied up
        printed = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, printed
    reached = validated(printed)[-1]
    resumed = recipe.run("dual_ar", *few, 1, "--steps", reached + 1)
    return Interrupted(reached, resumed)


def validated(printed: str) -> list[int]:
    """The steps whose validation a training has printed."""
    return [int(step) for step in re.findall(r"^step (\d+): validation", printed, flags=re.M)]


def test_a_killed_training_resumes_from_its_last_checkpoint(interrupted: Interrupted) -> None:
    begun = re.search(r"^resuming from step (\d+)$", interrupted.resumed, flags=re.M)
    assert begun
    # It may have been killed between reporting a step and writing its checkpoint.
    assert interrupted.reached - 2 <= int(begun[1]) <= interrupted.reached
    steps = range(int(begun[1]) + 1, interrupted.reached + 2)
    assert validated(interrupted.resumed) == list(steps)


@pytest.mark.usefixtures("interrupted")
def test_what_was_trained_is_packed_and_speaks(recipe: Recipe) -> None:
    recipe.run("codec_decoder", "--steps", 5, "--batch", 4)
    printed = recipe.run("g2p", "--data", recipe.data, "--steps", 10, "--held-back", 50)
    assert "'held_back': 50" in printed
    assert "fingerprint" in recipe.run("pack", "--data", recipe.data)
    assert {*weights.FILES, "lexicon.txt.gz"} == {path.name for path in recipe.data.iterdir()}

    voice = Voice(weights=str(recipe.data))
    voice.setup("cpu")
    samples = np.concatenate(list(voice.speak(SpeechRequest("Hello, xyzzyx!", "slt"))))
    assert np.isfinite(samples).all()
    assert len(samples) > 0.05 * voice.sample_rate
    assert np.abs(samples).max() > 0.01, "silence"


def test_too_few_sentences_are_reported(recipe: Recipe) -> None:
    with recipe.start("dual_ar", "--held-back", 48) as process:
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "training.dual_ar: --held-back 48 of 48 sentences" in printed.splitlines()[-1]
    with recipe.start("g2p", "--data", recipe.data, "--held-back", 1000) as process:
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "training.g2p: --held-back 1000 of" in printed.splitlines()[-1]
