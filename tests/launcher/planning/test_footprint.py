"""Measuring a footprint, with real processes on the CPU and a fake driver for a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.config.settings import ProbeRequest, Settings, load
from launcher.config.sizes import GIB, MIB
from launcher.config.state import StateDir
from launcher.planning import sampling
from launcher.planning.devices import cpu_device
from launcher.planning.footprint import MeasureError, Probe, measure
from launcher.planning.host import read_host
from launcher.planning.inventory import Device, Footprint, Host
from launcher.planning.nvml import Driver
from launcher.planning.plan import DoesNotFit
from launcher.planning.sampling import CpuSampler, GpuSampler, MemoryWatch, Sampler, Usage, tree_pss
from launcher.planning.sizing import build_plan, known_footprint, measure_footprint
from launcher.supervision.measurement_worker import MeasurementWorker, free_port, measurement_start
from tests.launcher.planning.fake_nvml import FakeNvml, Gpu, Process
from tests.waiting import until

SERVER = """
import http.server, json, subprocess, sys, time
port, behaviour = int(sys.argv[1]), sys.argv[2]
if behaviour == "breaks":
    print("loading"); print("no such weights: x.bin", file=sys.stderr); sys.exit(3)
if behaviour == "never":
    print("still loading", flush=True); time.sleep(600)
if behaviour == "parent":
    work = "import time; x = bytearray(60 << 20); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", work])
kept = bytearray(30 << 20)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        found = {"/readyz": b"ok", "/longest_request": b'{"path": "/big", "json": {"mib": 80}}'}
        self.answer(200 if self.path in found else 404, found.get(self.path, b"{}"))
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if behaviour == "refuses":
            return self.answer(400, b"no such voice\\n")
        if behaviour == "dies":
            import os; os._exit(9)
        big = bytearray(body["mib"] << 20); time.sleep(0.3)
        self.answer(200, b"done")
    def answer(self, status, body):
        self.send_response(status); self.send_header("Content-Length", str(len(body)))
        self.end_headers(); self.wfile.write(body)
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def starting(tmp_path: Path) -> Callable[[str], Callable[[], MeasurementWorker]]:
    script = tmp_path / "server.py"
    script.write_text(SERVER)

    def of(behaviour: str) -> Callable[[], MeasurementWorker]:
        def start() -> MeasurementWorker:
            port = free_port()
            return MeasurementWorker.start(
                [sys.executable, str(script), str(port), behaviour],
                environment={"PYTHONUNBUFFERED": "1"},
                folder=tmp_path,
                port=port,
                ready_path="/readyz",
                log=tmp_path / "worker.log",
            )

        return start

    return of


def on_cpu(
    start: Callable[[], MeasurementWorker],
    requests: list[Probe],
    load_timeout: float = 60.0,
    request_timeout: float = 60.0,
    sampler: Sampler | None = None,
) -> Footprint:
    return measure(
        start,
        sampler or CpuSampler(),
        requests,
        load_timeout=load_timeout,
        request_timeout=request_timeout,
        device="CPU",
    )


def test_the_longest_request_decides(
    starting: Callable[[str], Callable[[], MeasurementWorker]],
) -> None:
    small = on_cpu(starting("well"), [Probe("POST", "/x", b'{"mib": 1}')])
    large = on_cpu(starting("well"), [])  # the model's own: 80 MiB
    assert small.steady > 30 * MIB
    assert large.steady - small.steady > 60 * MIB
    assert large.peak >= large.steady
    assert (large.how, large.device, large.requests) == ("measured", "CPU", 3)
    assert large.samples > 5
    assert large.host_ram is not None
    assert large.exact


def test_children_count_and_do_not_outlive_it(
    starting: Callable[[str], Callable[[], MeasurementWorker]],
) -> None:
    started: list[MeasurementWorker] = []
    family: list[psutil.Process] = []

    def start() -> MeasurementWorker:
        started.append(starting("parent")())
        return started[0]

    class Noting(CpuSampler):
        def sample(self, pid: int) -> Usage:
            family[:] = psutil.Process(pid).children(recursive=True) or family
            return super().sample(pid)

    found = on_cpu(start, [Probe("GET", "/readyz")], sampler=Noting())
    assert found.steady > 85 * MIB
    assert family
    assert not any(process.is_running() and process.status() != "zombie" for process in family)
    assert started[0].exit_code() is not None
    started[0].stop()  # again does nothing


@pytest.mark.parametrize(
    ("behaviour", "deadlines", "words"),
    [
        ("breaks", {}, ["could not load", "no such weights: x.bin"]),
        ("never", {"load_timeout": 1.0}, ["not ready within 1 s", "load_timeout", "still loading"]),
        ("refuses", {}, ["POST /big returned 400: no such voice", "footprint.requests"]),
        ("dies", {}, ["POST /big failed", "exit code 9"]),
        ("well", {"request_timeout": 0.05}, ["took longer than 0.05 s", "request_timeout"]),
    ],
)
def test_what_goes_wrong_is_one_line_and_leaves_nothing(
    starting: Callable[[str], Callable[[], MeasurementWorker]],
    behaviour: str,
    deadlines: dict[str, float],
    words: list[str],
) -> None:
    started: list[MeasurementWorker] = []

    def start() -> MeasurementWorker:
        started.append(starting(behaviour)())
        return started[0]

    with pytest.raises(MeasureError) as caught:
        on_cpu(
            start,
            [Probe("POST", "/big", b'{"mib": 80}')],
            load_timeout=deadlines.get("load_timeout", 60.0),
            request_timeout=deadlines.get("request_timeout", 60.0),
        )
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert started[0].exit_code() is not None
    assert not psutil.pid_exists(started[0].pid)


def test_a_command_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    def start() -> MeasurementWorker:
        return MeasurementWorker.start(
            ["no-such-command-anywhere"],
            environment={},
            folder=tmp_path,
            port=1,
            ready_path="/",
            log=tmp_path / "log",
        )

    with pytest.raises(MeasureError, match="could not be started"):
        on_cpu(start, [])


@dataclass
class GpuWorker:
    """A worker in this process that takes memory of a fake GPU: its model, then per request."""

    gpu: Gpu
    takes: int = 5 * GIB
    starts_with: int = 7 * GIB
    leaves: int = 0
    meanwhile: Callable[[], None] = lambda: None
    """What other processes do once it has loaded."""
    pid: int = field(default_factory=os.getpid)
    host: str = "127.0.0.1"
    ready_path: str = "/readyz"

    def __post_init__(self) -> None:
        self.before = self.gpu.free
        self.gpu.free = self.before - self.starts_with
        worker = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                worker.gpu.free = worker.before - worker.takes
                worker.meanwhile()
                self.send_response(200 if self.path == "/readyz" else 404)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer((self.host, 0), Handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever)
        # Not ready before the peak was seen: sampling comes first, then the answer.
        self.timer = threading.Timer(0.5, self.thread.start)
        self.timer.start()

    def exit_code(self) -> int | None:
        return None

    def exit_reason(self) -> str:
        return ""

    def stop(self) -> None:
        self.timer.join()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
        self.gpu.free = self.before - self.leaves


def on_gpu(**traits: Any) -> Any:
    gpu = Gpu("GPU-a", 24 * GIB, 20 * GIB)
    driver = Driver.open(FakeNvml(gpu))
    assert driver is not None
    sampler = GpuSampler(driver, "GPU-a", timeout=0.3)
    return measure(
        lambda: GpuWorker(gpu, **traits),
        sampler,
        [Probe("GET", "/readyz")],
        load_timeout=30.0,
        request_timeout=30.0,
        device="Card",
    )


def test_on_a_gpu_it_is_the_change_of_free_memory() -> None:
    found = on_gpu()
    assert (found.peak, found.steady) == (7 * GIB, 5 * GIB)
    assert found.exact
    assert found.host_ram > MIB


@pytest.mark.parametrize("leaves", [GIB, -GIB])
def test_a_neighbour_that_moves_meanwhile_is_noticed(leaves: int) -> None:
    assert not on_gpu(leaves=leaves).exact


def measured_beside_others(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    disturbances: list[Callable[[Gpu], None]],
    **traits: Any,
) -> tuple[Footprint, Footprint | None, list[str]]:
    """Measure on a fake GPU, one disturbance a measurement; what was found, what was kept, and
    what was said."""
    monkeypatch.setattr(sampling, "SETTLE_TIMEOUT", 0.3)
    tenants = [Process(1, 4 * GIB), Process(2, GIB)]
    gpu = Gpu("GPU-a", 24 * GIB, 15 * GIB, processes=tenants)
    monkeypatch.setattr(Driver, "open", lambda nvml=None: Driver(FakeNvml(gpu)))
    settings = settings_for(
        folder, {"target": "hello:Hello"}, **{"footprint.requests": [{"path": "/readyz"}]}
    )
    state = StateDir(settings.state_dir).create()
    driver = Driver.open()
    assert driver is not None
    device, pending = driver.devices()[0][0], iter(disturbances)

    def start(_: Device) -> GpuWorker:
        disturb = next(pending)
        return GpuWorker(gpu, meanwhile=lambda: disturb(gpu), **traits)

    said: list[str] = []
    found = measure_footprint(settings, [device], state, start, said.append)
    assert next(pending, None) is None, "no measurement more, no fewer"
    return found, known_footprint(settings, [device], state), said


def leave(gpu: Gpu) -> None:
    """The tenant with 4 GiB ends. ``GpuWorker`` sets what is free, so it stays in its memory."""
    gpu.free += 4 * GIB
    gpu.processes = [process for process in gpu.processes if process.pid != 1]


def leave_while_another_comes(gpu: Gpu) -> None:
    gpu.processes = [Process(3, 4 * GIB), Process(2, GIB)]


def quiet(gpu: Gpu) -> None:
    """Nothing moves."""


@pytest.mark.parametrize("disturb", [leave, leave_while_another_comes])
def test_a_disturbed_measurement_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disturb: Callable[[Gpu], None]
) -> None:
    found, kept, said = measured_beside_others(tmp_path, monkeypatch, [disturb, quiet])
    assert (found.steady, found.exact) == (5 * GIB, True)
    assert kept == found
    assert "other processes changed the memory of Card; measuring again (2 of 3)" in said


def test_a_guess_is_used_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def come_and_go(gpu: Gpu) -> None:
        gpu.processes = [Process(gpu.processes[0].pid + 10, 4 * GIB)]

    found, kept, said = measured_beside_others(tmp_path, monkeypatch, [come_and_go] * 3)
    assert not found.exact
    assert kept is None
    card = Device("GPU-a", "Card", "gpu", 24 * GIB, 15 * GIB)
    planned = build_plan(settings_for(tmp_path, {"target": "hello:Hello"}), [card], Host(), found)
    assert any("is an estimate and is not stored" in warning for warning in planned.warnings)
    assert sum("measuring again" in line for line in said) == 2


def test_a_measurement_that_tells_nothing_is_not_blamed_on_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"takes": 2 * GIB, "starts_with": 2 * GIB}
    found, _, _ = measured_beside_others(tmp_path, monkeypatch, [leave, quiet], **small)
    assert (found.steady, found.exact) == (2 * GIB, True)
    with pytest.raises(MeasureError, match="other processes freed memory of Card"):
        measured_beside_others(tmp_path / "again", monkeypatch, [leave] * 3, **small)


def test_a_worker_that_does_not_use_its_gpu_is_refused() -> None:
    with pytest.raises(MeasureError, match=r"no memory of Card.*setup\(device\)"):
        on_gpu(takes=0, starts_with=0)


def test_a_gpu_that_stops_answering_is_one_line() -> None:
    gpu = Gpu("GPU-a", 24 * GIB, 20 * GIB)
    driver = Driver.open(FakeNvml(gpu))
    assert driver is not None

    class Falling(GpuSampler):
        def sample(self, pid: int) -> Usage:
            raise LookupError("GPU is lost")

    with pytest.raises(MeasureError, match="GPU is lost"):
        measure(
            lambda: GpuWorker(gpu),
            Falling(driver, "GPU-a", timeout=0.1),
            [Probe("GET", "/readyz")],
            load_timeout=30.0,
            request_timeout=30.0,
        )


def test_sampling_keeps_the_highest_of_each_phase() -> None:
    values = iter([3, 9, 4, 5, 2])
    watch = MemoryWatch(lambda: Usage(next(values), 1))
    watch.take()
    watch.take()
    watch.enter("serving")
    watch.take()
    watch.take()
    assert watch.device == {"starting": 9, "serving": 5}
    assert watch.samples == 5


def test_pss_of_a_tree() -> None:
    assert tree_pss(os.getpid()) > MIB
    assert tree_pss(2**22 + 11) == 0


def test_probes_from_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_bytes(b"RIFF")
    assert Probe.of(ProbeRequest(path="/a")) == Probe("GET", "/a")
    posted = Probe.of(ProbeRequest.model_validate({"path": "/a", "json": {"b": 1}}))
    assert (posted.method, json.loads(posted.body)) == ("POST", {"b": 1})
    sent = Probe.of(ProbeRequest(path="/a", body_file=tmp_path / "x.wav", content_type="audio/wav"))
    assert (sent.body, sent.content_type) == (b"RIFF", "audio/wav")
    with pytest.raises(MeasureError, match=r"none\.wav: No such file"):
        Probe.of(ProbeRequest(path="/a", body_file=tmp_path / "none.wav"))


def settings_for(folder: Path, model: dict[str, Any], **more: Any) -> Settings:
    folder.mkdir(exist_ok=True)
    (folder / "gpufarm.toml").write_text('state_dir = "state"\n')
    return load(folder / "gpufarm.toml", {"model": model, **more}, {"HOME": str(folder)})


def test_a_real_worker_is_measured_once_and_remembered(tmp_path: Path) -> None:
    (tmp_path / "hello.py").write_text(
        "class Hello:\n"
        "    def setup(self, device):\n        self.kept = bytearray(50 << 20)\n"
        "    def predict(self, request):\n        return {'n': len(self.kept)}\n"
        "    def longest_request(self):\n        return {'path': '/predict', 'json': {}}\n"
    )
    settings = settings_for(tmp_path, {"target": "hello:Hello"})
    state, device = StateDir(settings.state_dir), cpu_device(read_host())
    assert known_footprint(settings, [device], state) is None
    lines: list[str] = []
    found = measure_footprint(
        settings, [device], state, measurement_start(settings, state), progress=lines.append
    )
    assert found.steady > 60 * MIB
    assert found.requests == 3
    assert lines[0].startswith("measuring the footprint of one worker on CPU")
    assert lines[1] == "starting one worker"
    assert known_footprint(settings, [device], state) == found


def test_a_measured_worker_bears_the_mark_and_ends_with_a_killed_command(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "class Slow:\n"
        "    def setup(self, device):\n        time.sleep(600)\n"
        "    def predict(self, request):\n        return request\n"
    )
    (tmp_path / "gpufarm.toml").write_text(
        'state_dir = "state"\nmodel.target = "slow:Slow"\nbudget.devices = ["cpu"]\n'
    )
    command = [sys.executable, "-P", "-m", "launcher.cli", "plan", "--measure"]
    given = os.environ | {"GPUFARM_LOGS__BACKUPS": "1", "SUPERVISOR_PROCESS_NAME": "another's"}
    with subprocess.Popen(command, cwd=tmp_path, env=given, stderr=subprocess.PIPE) as measuring:

        def workers() -> list[psutil.Process]:
            children = psutil.Process(measuring.pid).children()
            return [child for child in children if "workers" in child.cmdline()]

        found = until(workers, "a worker that loads")[0]
        environment = found.environ()
        measuring.kill()
    assert environment["GPUFARM_FARM"] == str((tmp_path / "state").resolve())
    assert "GPUFARM_LOGS__BACKUPS" not in environment
    assert "SUPERVISOR_PROCESS_NAME" not in environment
    try:
        until(lambda: not alive(found), "the worker's end")
    finally:
        with suppress(psutil.NoSuchProcess):
            found.kill()


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    settings = settings_for(
        tmp_path,
        {"command": ["no-such-command-anywhere", "{port}"]},
        **{"footprint.requests": [{"path": "/"}]},
    )
    state = StateDir(settings.state_dir)
    with pytest.raises(MeasureError, match="could not load: cannot run no-such-command-anywhere"):
        measure_footprint(
            settings, [cpu_device(read_host())], state, measurement_start(settings, state)
        )


def test_a_worker_that_cannot_load_says_so(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, {"target": "nowhere:Nothing"})
    state = StateDir(settings.state_dir)
    with pytest.raises(MeasureError, match=r"could not load: .*nowhere"):
        measure_footprint(
            settings, [cpu_device(read_host())], state, measurement_start(settings, state)
        )


def test_a_worker_that_the_kernel_ended_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counter stands in for a memory limit, which a test may not be allowed to set."""
    settings = settings_for(tmp_path, {"target": "nowhere:Nothing"})
    state = StateDir(settings.state_dir)
    counts = iter([2, 3])
    monkeypatch.setattr("launcher.planning.host.killed_for_memory", lambda: next(counts))
    with pytest.raises(
        DoesNotFit, match=r"OOM killer ended it; free RAM, or raise the memory limit"
    ):
        measure_footprint(
            settings, [cpu_device(read_host())], state, measurement_start(settings, state)
        )
