"""The benchmarks on a GPU: graphs agree with eager execution, and every section passes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import mps
from benchmarks.gpu.__main__ import SECTIONS
from tests.repository import REPOSITORY
from workers.models.voice.weights import DATA, FILES

MISSING = [name for name in FILES if not (DATA / name).exists()]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(bool(MISSING), reason=f"{DATA} lacks {', '.join(MISSING)}"),
]


def run(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def test_graphs_and_eager_steps_agree_on_a_gpu() -> None:
    done = run("benchmarks.fidelity", "--device", "cuda:0", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)["rows"]
    graphs = [row for row in rows if row["compared"].startswith("cuda-graph")]
    assert [row["against"] for row in graphs] == [
        f"eager {dtype} at temperature {temperature}"
        for dtype in ("float32", "bfloat16")
        for temperature in ("0", "0.8")
    ]
    for row in graphs:
        assert not row["skipped"]
        assert row["codes_equal"] == row["codes"] > 0


@pytest.mark.timeout(600)
def test_every_section_passes_on_a_gpu(tmp_path: Path) -> None:
    names = [section.name for section in SECTIONS if not section.mps or shutil.which(mps.CONTROL)]
    done = run("benchmarks.gpu", "--out", tmp_path, "--quick", "--seconds", 360, "--only", *names)
    assert done.returncode == 0, done.stdout + done.stderr
