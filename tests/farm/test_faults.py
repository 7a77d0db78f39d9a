"""Orders that are refused, counts that do not fit, sessions that end: nothing is left undone."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

from tests.farm.harness import FarmUnderTest, lives, new_farm
from tests.farm.models import WORK, serve_work
from tests.farm.test_life import leaves_nothing
from tests.waiting import until


@contextmanager
def refusing_once(at: Path, method: str) -> Iterator[list[str]]:
    """Stand between supervisord and its callers: the first call of ``method`` is answered 500.

    Yields the calls that went through.
    """
    behind = at.with_name("behind.sock")
    at.rename(behind)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(at))
    at.chmod(0o600)
    server.listen(16)
    refused = threading.Event()
    calls: list[str] = []

    def request(caller: socket.socket) -> bytes:
        data = b""
        while b"\r\n\r\n" not in data:
            piece = caller.recv(65536)
            if not piece:
                return b""
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(re.search(rb"(?i)content-length: *(\d+)", head)[1])  # type: ignore[index]
        while len(body) < length:
            body += caller.recv(65536)
        head = re.sub(rb"(?im)^connection:.*\r\n", b"", head + b"\r\n").rstrip()
        return head + b"\r\nConnection: close\r\n\r\n" + body

    def handle(caller: socket.socket) -> None:
        with caller, suppress(OSError):
            data = request(caller)
            if not data:
                return
            name = re.search(rb"<methodName>supervisor\.(\w+)", data)
            called = name[1].decode() if name else ""
            if called == method and not refused.is_set():
                refused.set()
                caller.sendall(b"HTTP/1.0 500 Oops\r\nContent-Length: 0\r\n\r\n")
                return
            calls.append(called)
            with socket.socket(socket.AF_UNIX) as there:
                there.connect(str(behind))
                there.sendall(data)
                while piece := there.recv(65536):
                    caller.sendall(piece)

    def accept() -> None:
        with suppress(OSError):
            while True:
                caller, _ = server.accept()
                threading.Thread(target=handle, args=(caller,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield calls
        assert refused.is_set(), f"{method} was never called"
    finally:
        server.close()
        with suppress(FileNotFoundError):
            behind.rename(at)


def restarted(farm: FarmUnderTest) -> None:
    """A controller with fresh connections."""
    old = farm.pid_of("launcher.controller")
    psutil.Process(old).kill()
    farm.wait_for_another_controller(old)


def test_a_drain_that_supervisord_refused_is_repeated() -> None:
    with new_farm(workers="count = 3") as farm:
        farm.run("up")
        victim = farm.pids()["w3"]
        with refusing_once(farm.runtime / "supervisor.sock", "stopProcess") as calls:
            restarted(farm)
            assert farm.admin("PUT", "/workers", {"count": 2}).status_code == 200
            until(lambda: not lives(victim), "w3 is drained after all", seconds=40)
            until(lambda: farm.admin("GET", "/workers").json()["settled"], "all is done")
            assert "stopProcess" in calls
            assert farm.states() == {"w1": "ready", "w2": "ready"}


def test_a_kill_that_supervisord_refused_is_repeated() -> None:
    """A worker that never becomes ready is ended at its load timeout; the others go on."""
    with new_farm(workers="count = 1", options=("--load-seconds", "2")) as farm:
        text = (farm.folder / "gpufarm.toml").read_text()
        farm.configure(text.replace("load_timeout = 30", "load_timeout = 8"))
        farm.run("up")
        with refusing_once(farm.runtime / "supervisor.sock", "signalProcess") as calls:
            restarted(farm)
            assert farm.admin("PUT", "/workers", {"count": 2}).status_code == 200
            pid = until(lambda: farm.pids().get("w2"), "w2 starts", every=0.01)
            assert pid is not None
            psutil.Process(pid).suspend()
            until(lambda: not lives(pid), "it is killed at its load timeout", seconds=60)
            assert "signalProcess" in calls
            farm.wait_for(w1="ready", w2="ready")


def test_a_count_that_does_not_fit_beside_a_drained_slot_changes_nothing() -> None:
    """Either all of a change is made or none of it."""
    with new_farm(workers="count = 3") as farm:
        farm.run("up")
        farm.run("drain", "w2")
        before = farm.pids()
        conf = (farm.state / "nginx.conf").read_bytes()
        text = (farm.folder / "gpufarm.toml").read_text().replace("count = 3", "count = 4")
        farm.configure(text + '[balancer]\nbody_limit = "3MiB"\n')
        done = subprocess.run(
            farm.command("up"),
            cwd=farm.folder,
            env=farm.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        changed = (farm.state / "nginx.conf").read_bytes() != conf
        assert (done.returncode == 0) == changed, done.stderr
        if done.returncode:
            assert farm.pids() == before
        else:
            assert set(farm.pids()) >= {"w1", "w3", "w4"}


def test_taking_back_a_rollout_leaves_no_worker_of_it() -> None:
    with new_farm() as farm:
        serve_work(farm, workers="count = 3\nmax = 3")
        farm.run("up")
        first = (farm.folder / "gpufarm.toml").read_text()
        slow = WORK.replace("VERSION = 1", "VERSION = 2").replace(
            "self.version = VERSION", "time.sleep(1.5); self.version = VERSION"
        )
        (farm.folder / "slow.py").write_text(slow)
        farm.configure(first.replace("work:Work", "slow:Work"))
        up = subprocess.Popen(
            farm.command("up"),
            cwd=farm.folder,
            env=farm.environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            until(lambda: not all(w["current"] for w in farm.workers().values()), "one is new")
            farm.configure(first)
            farm.run("up")
            assert all(worker["current"] for worker in farm.workers().values())
            answers = [httpx.post(f"{farm.url}/predict", json={}).json() for _ in range(9)]
            assert {answer["version"] for answer in answers} == {1}
            _, message = up.communicate(timeout=60)
            assert up.returncode == 1, message
        finally:
            up.kill()
            up.wait()


def test_ports_are_known_without_their_file() -> None:
    with new_farm() as farm:
        farm.run("up")
        pids, port = farm.pids(), farm.workers()["w1"]["port"]
        (farm.state / "ports.json").unlink()
        farm.configure(
            (farm.folder / "gpufarm.toml").read_text() + '[balancer]\nbody_limit = "1MiB"\n'
        )
        farm.run("up")
        assert farm.pids() == pids
        assert farm.workers()["w1"]["port"] == port
        assert httpx.post(f"{farm.url}/work").status_code == 200


def test_a_command_that_waits_ends_when_the_supervisor_has_ended() -> None:
    with new_farm(options=("--load-seconds", "30"), workers="count = 1") as farm:
        up = subprocess.Popen(farm.command("up"), cwd=farm.folder, env=farm.environment)
        try:
            until(lambda: farm.states() == {"w1": "starting"}, "it starts")
            scale = subprocess.Popen(
                farm.command("scale", "2"),
                cwd=farm.folder,
                env=farm.environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            until(lambda: farm.admin("GET", "/workers").json()["count"] == 2, "it was heard")
            psutil.Process(farm.pid_of("launcher.supervision.run_supervisord")).kill()
            _, message = scale.communicate(timeout=60)
            assert scale.returncode == 1
            assert "supervisor has ended" in message
            until(lambda: farm.pid_of("launcher.controller") == 0, "the controller has ended too")
        finally:
            up.kill()
            up.wait()


def test_up_and_down_after_a_logout_leave_no_worker_behind() -> None:
    """The session's whole runtime directory has gone, and the next commands have none."""
    with new_farm(workers="count = 2") as farm:
        session = farm.folder.parent / "session"
        session.mkdir(mode=0o700)
        farm.more_environment["XDG_RUNTIME_DIR"] = str(session)
        farm.run("up")
        first = farm.pids()
        shutil.rmtree(session)
        farm.run("up")
        second = farm.pids()
        assert first == second or not [pid for pid in first.values() if lives(pid)]
        farm.run("down")
        assert not [pid for pid in (*first.values(), *second.values()) if lives(pid)]
        leaves_nothing(farm)
