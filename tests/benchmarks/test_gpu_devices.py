"""How the GPU benchmark uses the driver and MPS, with stand-ins for both."""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from benchmarks.gpu import meter, mps
from benchmarks.gpu.job import BenchmarkError
from tests.launcher.planning.fake_nvml import FakeNvml, Gpu

GIB = 1 << 30
CONTROL = """
    import os, pathlib, subprocess, sys
    pipe = pathlib.Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
    assert pipe.is_dir() and pathlib.Path(os.environ["CUDA_MPS_LOG_DIRECTORY"]).is_dir()
    state, here = pipe / "daemon", pathlib.Path(__file__).parent
    if sys.argv[1:] == ["-d"]:
        if (here / "refuses").exists():
            sys.exit("no MPS for you")
        # The daemon inherits its parent's output, as the real one does.
        daemon = subprocess.Popen([str(here / "nvidia-cuda-mps-server"), "120"])
        state.write_text(str(daemon.pid))
        sys.exit(0)
    order = sys.stdin.read().split()
    if not state.exists():
        sys.exit("Cannot find MPS control daemon process")
    if order[0] == "get_server_list":
        print(4242)
    elif order[0] == "get_client_list":
        print((here / "clients").read_text())
    elif order[0] == "quit" and not (here / "stubborn").exists():
        os.kill(int(state.read_text()), 9)
"""


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a stand-in for MPS on the PATH and return its folder."""
    script = tmp_path / mps.CONTROL
    script.write_text(f"#!{sys.executable}\n{textwrap.dedent(CONTROL)}")
    script.chmod(0o755)
    server = tmp_path / "nvidia-cuda-mps-server"
    server.write_text(f"#!{sys.executable}\nimport sys, time\ntime.sleep(float(sys.argv[1]))\n")
    server.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(mps, "STOP_TIMEOUT", 1.0)
    return tmp_path


def daemons(folder: str) -> list[psutil.Process]:
    found = mps._processes(Path(folder).parent)
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


def test_a_private_daemon_is_started_and_stopped(control: Path) -> None:
    with mps.daemon(os.environ) as environment:
        pipe = environment["CUDA_MPS_PIPE_DIRECTORY"]
        assert len(daemons(pipe)) == 1
        assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ
        (control / "clients").write_text("11\n12\n")
        assert mps.clients(environment) == [11, 12]
        assert mps.check_attached(environment, [12]) == "by pid"
        assert mps.check_attached(environment, [91, 92]) == "by number"
        with pytest.raises(BenchmarkError, match=r"not attached to MPS: \[13\]; .*\[11, 12\]"):
            mps.check_attached(environment, [12, 13])
    assert not daemons(pipe)
    assert not Path(pipe).exists()


@pytest.mark.parametrize("stubborn", [False, True])
def test_the_daemon_is_stopped_when_its_section_fails(control: Path, stubborn: bool) -> None:
    if stubborn:
        (control / "stubborn").touch()
    with (
        pytest.raises(ValueError, match="section"),
        mps.daemon(os.environ) as environment,
    ):
        raise ValueError("section")
    assert not daemons(environment["CUDA_MPS_PIPE_DIRECTORY"])


def test_a_daemon_that_fails_to_start_is_reported(control: Path) -> None:
    (control / "refuses").touch()
    with pytest.raises(BenchmarkError, match="no MPS for you"), mps.daemon(os.environ):
        pass


def test_a_missing_mps_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchmarkError, match="not on the PATH"), mps.daemon(os.environ):
        pass


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[Gpu]:
    found = [
        Gpu("GPU-a", 80 * GIB, 70 * GIB),
        Gpu("GPU-b", 40 * GIB, 40 * GIB, slices=[None, Gpu("MIG-c", 10 * GIB, 9 * GIB)]),
        Gpu("GPU-d", 40 * GIB, 40 * GIB, slices=[Gpu("MIG-e", 10 * GIB, 9 * GIB)]),
    ]
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(*found))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return found


def test_used_memory_is_the_drop_in_free_memory(gpus: list[Gpu]) -> None:
    found = meter.meter_of("GPU-a")
    assert found.used([]) == 0
    gpus[0].free -= 3 * GIB
    assert found.used([1, 2]) == 3 * GIB
    assert found.free() == 67 * GIB
    gpus[0].free += 4 * GIB  # another process has exited
    assert found.used([]) == -GIB


def test_an_unknown_device_is_reported(gpus: list[Gpu]) -> None:
    with pytest.raises(LookupError, match="GPU-z"):
        meter.meter_of("GPU-z")


@pytest.mark.parametrize(
    ("visible", "uuid"),
    [(None, "GPU-a"), ("GPU-b", "GPU-b"), ("0,1", "GPU-a"), ("2", "MIG-e"), ("MIG-c", "MIG-c")],
)
def test_the_device_is_the_first_one_visible_to_cuda(
    gpus: list[Gpu], monkeypatch: pytest.MonkeyPatch, visible: str | None, uuid: str
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert meter.first_device().uuid == uuid


def test_a_missing_driver_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(absent=True))
    with pytest.raises(LookupError, match="does not respond"):
        meter.first_device()


def test_memory_on_a_cpu_is_that_of_the_processes() -> None:
    found = meter.meter_of("")
    assert found.used([os.getpid()]) > 1 << 20
    assert found.used([2**22 + 1]) == 0
    assert found.free() is None
