"""The lifecycle of a worker process: load, or fail with a message; serve, drain, exit."""

from __future__ import annotations

import concurrent.futures
import json
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.repository import REPOSITORY
from tests.workers.harness import TIMEOUT, WorkerProcess, eventually

FAULTY = "tests.workers.models.faulty_start"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("no_such_module:Model", "no module named no_such_module"),
        ("tests.workers.models.broken_import:M", "needs the module a_module_that_does"),
        ("tests.workers.models.plain:Ecko", "did you mean Echo?"),
        (f"{FAULTY}:Arguments", "missing a required argument: 'size'"),
        (f"{FAULTY}:NoPredict", "neither predict(request) nor speak(request)"),
        (f"{FAULTY}:NoVoices", "got []"),
    ],
)
def test_permanent_load_error_exits_with_3_and_one_line(
    tmp_path: Path, target: str, words: str
) -> None:
    assert_ends(tmp_path, target, 3, words)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (f"{FAULTY}:ConstructorFails", "the hub does not answer"),
        (f"{FAULTY}:SetupFails", "weights.safetensors is missing second line"),
        (f"{FAULTY}:WarmUpFails", "no kernel image"),
        (f"{FAULTY}:HealthFails", "must return a dict, got list"),
        (f"{FAULTY}:Exits", "SystemExit"),
        (f"{FAULTY}:OutOfMemory", "Tried to allocate 2.00 GiB"),
    ],
)
def test_transient_load_error_exits_with_1_and_one_line(
    tmp_path: Path, target: str, words: str
) -> None:
    assert_ends(tmp_path, target, 1, words)


def without_extras(folder: Path) -> dict[str, str]:
    """An environment in which what the extra [speech] installs cannot be imported."""
    absent = folder / "absent"
    absent.mkdir()
    for name in ("numpy", "soundfile", "num2words"):
        (absent / f"{name}.py").write_text(f"raise ModuleNotFoundError('absent', name={name!r})\n")
    return {"PYTHONPATH": f"{absent}:{REPOSITORY}"}


def test_a_base_installation_serves_predict(tmp_path: Path) -> None:
    target = "tests.workers.models.plain:Echo"
    with WorkerProcess(tmp_path, target, environment=without_extras(tmp_path)) as worker:
        assert worker.client.post(f"{worker.url}/predict", json={"a": 1}).json() == {
            "echo": {"a": 1}
        }


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (
            f"{FAULTY}:NoVoices",
            "numpy is not installed; install it with: pip install 'gpufarm[speech]'",
        ),
        ("workers.models.voice:Voice", "pip install 'gpufarm[speech,torch,onnx]'"),
    ],
)
def test_a_base_installation_names_the_extra_that_a_speech_model_needs(
    tmp_path: Path, target: str, words: str
) -> None:
    assert_ends(tmp_path, target, 3, words, without_extras(tmp_path))


def assert_ends(
    folder: Path, target: str, code: int, words: str, environment: dict[str, str] | None = None
) -> None:
    worker = WorkerProcess(folder, target, environment=environment)
    try:
        assert worker.wait() == code
        (line,) = worker.lines
        assert "cannot load" in line
        assert words in line
    finally:
        worker.__exit__()


@pytest.mark.parametrize(
    ("raises", "code"),
    [
        ("import numpy.no_such_part", 3),
        ("def broken(:", 3),
        ("raise OSError(116, 'Stale file handle')", 1),
        ("raise ImportError('libx.so: failed to map segment from shared object')", 1),
    ],
)
def test_import_error_exits_with_3_if_permanent_and_1_if_transient(
    tmp_path: Path, raises: str, code: int
) -> None:
    (tmp_path / "wrong_module.py").write_text(raises + "\n")
    worker = WorkerProcess(tmp_path, "wrong_module:Model", spec={"path": [str(tmp_path)]})
    try:
        assert worker.wait() == code, worker.log
        assert "cannot load" in worker.log
    finally:
        worker.__exit__()


def test_invalid_spec_exits_with_3(tmp_path: Path) -> None:
    worker = WorkerProcess(tmp_path, "tests.workers.models.plain:Echo", spec={"queue_sizes": 3})
    try:
        assert worker.wait() == 3
        assert 'unknown key "queue_sizes"' in worker.log
        assert 'did you mean "queue_size"?' in worker.log
    finally:
        worker.__exit__()


def bound(*, shared: bool) -> socket.socket:
    """A socket that holds a free port, and does not listen."""
    holder = socket.socket()
    if shared:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


def test_server_started_during_the_load_keeps_its_port(tmp_path: Path) -> None:
    with bound(shared=True) as other:
        port = other.getsockname()[1]
        worker = WorkerProcess(
            tmp_path, "tests.workers.models.plain:Gated", {"folder": str(tmp_path)}, port=port
        )
        try:
            eventually((tmp_path / "loading").exists, "the load to begin")
            other.listen()
            (tmp_path / "gate").touch()
            assert worker.wait() == 1
            assert f"port {port} on 127.0.0.1 is in use" in worker.log
        finally:
            worker.__exit__()


@pytest.mark.parametrize("shared", [False, True])
def test_port_in_use_is_reported_before_loading(tmp_path: Path, shared: bool) -> None:
    with bound(shared=shared) as other:
        other.listen()
        port = other.getsockname()[1]
        worker = WorkerProcess(tmp_path, f"{FAULTY}:SetupFails", port=port)
        try:
            assert worker.wait() == 1
            assert f"port {port} on 127.0.0.1 is in use" in worker.log
            assert len(worker.lines) == 1
        finally:
            worker.__exit__()


def test_worker_shares_a_reserved_port(tmp_path: Path) -> None:
    """The controller holds a slot's port, bound with SO_REUSEPORT, and never listens."""
    with bound(shared=True) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), TIMEOUT)
        with WorkerProcess(tmp_path, "tests.workers.models.plain:Echo", port=port) as worker:
            for number in range(20):  # on a connection of its own each: none may go to the holder
                answer = httpx.post(f"{worker.url}/predict", json=number, timeout=TIMEOUT)
                assert answer.json() == {"echo": number}
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), TIMEOUT)


def test_port_bound_without_reuseport_is_in_use(tmp_path: Path) -> None:
    with bound(shared=False) as other:
        port = other.getsockname()[1]
        worker = WorkerProcess(tmp_path, "tests.workers.models.plain:Echo", port=port)
        try:
            assert worker.wait() == 1
            assert f"port {port} on 127.0.0.1 is in use" in worker.log
        finally:
            worker.__exit__()


def test_port_refuses_connections_until_the_model_is_warm(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    worker = WorkerProcess(
        tmp_path, "tests.workers.models.plain:Gated", {"folder": str(tmp_path)}, port=port
    )
    try:
        eventually((tmp_path / "loading").exists, "the load to begin")
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            pass
        gate.touch()
        with worker:
            assert worker.predict(5).json() == 5
    finally:
        worker.__exit__()


def test_sigterm_while_idle_exits_with_0(tmp_path: Path) -> None:
    with WorkerProcess(tmp_path, "tests.workers.models.plain:Echo") as worker:
        worker.predict(1)
        worker.terminate()
        assert worker.wait() == 0
        assert "draining running=0 waiting=0" in worker.log
        assert "drained served=1" in worker.log


def test_drain_finishes_running_and_waiting_requests(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with (
        WorkerProcess(tmp_path, "tests.workers.models.plain:Slow") as worker,
        concurrent.futures.ThreadPoolExecutor(8) as callers,
    ):
        answers = [
            callers.submit(
                httpx.post,
                f"{worker.url}/predict",
                json={"name": number, "until": str(gate)},
                timeout=TIMEOUT,
            )
            for number in range(5)
        ]
        eventually(
            lambda: worker.running_and_waiting() == (1, 4), "one that runs and four that wait"
        )
        worker.terminate()
        eventually(lambda: "draining running=1 waiting=4" in worker.log, "the drain")
        with pytest.raises((httpx.ConnectError, httpx.ReadError)):
            eventually(lambda: httpx.get(f"{worker.url}/livez") is None, "a closed listener")
        assert worker.process.poll() is None
        gate.touch()
        assert [answer.result().json()["name"] for answer in answers] == list(range(5))
        assert worker.wait() == 0


def test_drain_under_load_loses_no_request(tmp_path: Path) -> None:
    """Callers that open a connection each: those that were let in are answered."""
    with WorkerProcess(
        tmp_path, "tests.workers.models.plain:Slow", spec={"queue_size": 64}
    ) as worker:

        def calls() -> list[int]:
            seen: list[int] = []
            while True:
                try:
                    answer = httpx.post(
                        f"{worker.url}/predict", json={"seconds": 0.005}, timeout=TIMEOUT
                    )
                except (httpx.ConnectError, httpx.ReadError):
                    # refused, or accepted by the kernel but never by the worker: both are
                    # errors of the connection, after which a balancer asks another worker
                    return seen
                seen.append(answer.status_code)

        with concurrent.futures.ThreadPoolExecutor(4) as callers:
            results = [callers.submit(calls) for _ in range(4)]
            eventually(lambda: worker.health()["served"] > 20, "some traffic")
            worker.terminate()
            answered = [code for result in results for code in result.result(TIMEOUT)]
        assert worker.wait() == 0
        assert set(answered) == {200}
        assert len(answered) >= 20


def test_second_signal_exits_at_once(tmp_path: Path) -> None:
    with (
        WorkerProcess(tmp_path, "tests.workers.models.plain:Slow") as worker,
        concurrent.futures.ThreadPoolExecutor(1) as callers,
    ):
        answer = callers.submit(
            httpx.post,
            f"{worker.url}/predict",
            json={"until": str(tmp_path / "never")},
            timeout=TIMEOUT,
        )
        eventually(lambda: worker.running_and_waiting() == (1, 0), "the request")
        worker.terminate()
        eventually(lambda: "draining" in worker.log, "the drain")
        worker.terminate()
        assert worker.wait() == 128 + 15
        with pytest.raises(httpx.TransportError):
            answer.result(TIMEOUT)


def test_hanging_call_does_not_block_the_drain(tmp_path: Path) -> None:
    with WorkerProcess(
        tmp_path, "tests.workers.models.plain:Slow", spec={"request_timeout": 0.2}
    ) as worker:
        answer = worker.predict({"until": str(tmp_path / "never")})
        assert answer.status_code == 504
        worker.terminate()
        assert worker.wait() == 0


def test_lost_device_exits_with_1_after_the_response(tmp_path: Path) -> None:
    with WorkerProcess(tmp_path, "tests.workers.models.plain:Faulty") as worker:
        assert worker.predict({"kind": "memory"}).status_code == 500
        assert worker.predict({"kind": "fine"}).text == "fine"
        answer = worker.predict({"kind": "sticky"})
        assert answer.status_code == 500
        assert worker.wait() == 1
        assert "the device is lost" in worker.log


def test_waiting_requests_of_a_lost_device_get_no_response(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with (
        WorkerProcess(tmp_path, "tests.workers.models.plain:Slow") as worker,
        concurrent.futures.ThreadPoolExecutor(2) as callers,
    ):
        bodies: list[dict[str, object]] = [{"until": str(gate), "sticky": True}, {"name": "other"}]
        answers = []
        for running_and_waiting, body in zip([(1, 0), (1, 1)], bodies, strict=True):
            url = f"{worker.url}/predict"
            answers.append(callers.submit(httpx.post, url, json=body, timeout=TIMEOUT))
            while worker.running_and_waiting() != running_and_waiting:
                assert worker.process.poll() is None
        gate.touch()
        assert answers[0].result().status_code == 500
        with pytest.raises(httpx.TransportError):
            answers[1].result()
        assert worker.wait() == 1


def test_workers_import_neither_torch_nor_onnxruntime() -> None:
    script = (
        "import sys, workers.process, workers.http.app, json; "
        "print(json.dumps([m for m in ('torch', 'onnxruntime', 'litserve', 'launcher', 'balancer',"
        " 'fastapi', 'pydantic') if m in sys.modules]))"
    )
    output = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, check=True, capture_output=True, text=True
    )
    assert json.loads(output.stdout) == []
