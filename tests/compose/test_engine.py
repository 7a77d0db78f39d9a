"""The image built and the compose file brought up by a real engine.

``GPUFARM_TEST_COMPOSE`` names the tool that brings one: called with the project's folder and a
command, it builds, ends `docker-compose up --wait`, runs the command where the published ports
answer, and takes everything down again. It exits 77 where no engine can run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compose.conftest import INSIDE
from tests.repository import REPOSITORY

TOOL = "GPUFARM_TEST_COMPOSE"
NO_ENGINE = 77
DEADLINE_SECONDS = 40 * 60
OPTIONS = ("-v", "-rxXP", "--maxfail=3", "--timeout=420", "-pno:randomly", "-pno:cacheprovider")
"""With what the scenes print: they say what they measured."""

pytestmark = pytest.mark.skipif(
    bool(os.environ.get(INSIDE)), reason="this is what has called the tool"
)


@pytest.mark.compose
@pytest.mark.timeout(DEADLINE_SECONDS + 60)
def test_image_and_compose_file_on_a_real_engine(capsys: pytest.CaptureFixture[str]) -> None:
    tool = os.environ.get(TOOL)
    if not tool:
        pytest.skip(f"{TOOL} names no tool that brings up a container engine")
    inner = [sys.executable, "-m", "pytest", str(Path(__file__).parent / "inside")]
    # In the order in which they stand: they tell one farm's story.
    inner += OPTIONS
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GPUFARM_")}
    # PyTorch's own index need not be reached for this; and every image is to be built.
    environment = kept | {INSIDE: "1", "TORCH_INDEX": "", "COMPOSE_PROFILES": "loadtest"}
    with capsys.disabled():
        print(f"\n{tool}")
        done = subprocess.run(
            [tool, str(REPOSITORY), *inner],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            timeout=DEADLINE_SECONDS,
            check=False,
        )
    if done.returncode == NO_ENGINE:
        pytest.skip(f"{tool}: no container engine can run on this machine")
    assert done.returncode == 0, f"{tool} ended with {done.returncode}; its output stands above"
