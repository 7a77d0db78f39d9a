"""The proof for GPU machines, run where there is none: its logic, its processes, its failures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
WITHOUT_A_REGISTRY = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"num2words", "soundfile", "starlette", "uvicorn"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""
"""Puts a Python where the bare machine's is: without what is not installed there."""


def test_the_decoder_needs_no_server_and_no_audio_files() -> None:
    program = (
        WITHOUT_A_REGISTRY
        + "import workers.voice.decoding, workers.voice.weights, workers.voice.speech\n"
        + "from workers.voice.text import normalise\n"
        + "print(normalise('Nothing but words.'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "nothing but words."
