"""What the README shows, run as it is written there."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import httpx
import soundfile

from tests.farm.harness import REPOSITORY, FarmUnderTest, new_farm

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def block(language: str, containing: str) -> str:
    """The one fenced block of that language with those words in it."""
    found = re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)
    (match,) = [text for text in found if containing in text]
    return str(match)


def curl(farm: FarmUnderTest, line: str) -> subprocess.CompletedProcess[str]:
    words = shlex.split(line.replace("http://127.0.0.1:8000", farm.url))
    return subprocess.run(
        [words[0], "-sSf", *words[1:]],
        cwd=farm.folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


def test_the_demo_voice_answers_the_readmes_curl() -> None:
    with new_farm() as farm:
        farm.configure("")
        farm.run("up", "--workers", "1", "--port", str(farm.port), "--state-dir", str(farm.state))
        curl(farm, block("sh", "fox.wav").replace("\\\n", " "))
        samples, rate = soundfile.read(Path(farm.folder) / "fox.wav")
        assert rate == 16000
        assert 1.5 < len(samples) / rate < 6
        assert abs(samples).max() > 0.1


def test_the_eight_line_model_runs_as_written() -> None:
    with new_farm() as farm:
        (farm.folder / "my_model.py").write_text(block("python", "class Upper"))
        farm.configure(block("toml", "my_model:Upper"))
        farm.run("up", "--workers", "1", "--port", str(farm.port), "--state-dir", str(farm.state))
        (line,) = re.findall(r"`(curl http://127.0.0.1:8000/predict [^`]*)`", README)
        assert curl(farm, line).stdout == '{"text":"HI","device":"cpu"}'
        answer = httpx.post(f"{farm.url}/predict", json={"text": "hi"})
        assert answer.headers["x-worker-id"] == "w1"


def test_the_plan_is_the_one_that_is_shown() -> None:
    shown = block("console", "gpufarm plan").splitlines()
    with new_farm() as farm:
        farm.configure("")
        printed = farm.run(*shlex.split(shown[0].removeprefix("$ gpufarm "))).stdout.splitlines()
    rows = [line.split() for line in printed]
    for line in shown[1:]:
        assert line == "…" or line.split() in rows
