"""Farms from their start to their end, each test with its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import httpx
import psutil
import pytest

from launcher.supervision.supervisord import Supervisor
from tests.farm.harness import REPOSITORY, FarmUnderTest, external_server, lives, new_farm
from tests.waiting import free_port, listens, until

MEGABYTE = 2**20
UNPRIVILEGED_USER = 65534


def leaves_nothing(farm: FarmUnderTest) -> None:
    """No process, no socket, no temporary file; what was measured and logged may stay."""
    assert farm.processes() == []
    assert farm.sockets() == []
    left = {path.relative_to(farm.state).parts[0] for path in farm.state.rglob("*")}
    assert left <= {"logs", "cache", "lock", "ports.json", "footprints.json"}, left
    assert not listens(farm.port)


def test_a_farm_comes_and_goes_and_comes_again() -> None:
    with new_farm(workers="count = 1") as farm:
        assert "no farm is running" in farm.run("ps", expect=4).stderr
        assert not farm.state.exists(), "asking creates nothing"
        assert "no farm is running" in farm.run("down", expect=4).stderr
        farm.run("up")
        runtime = Path((farm.state / "runtime").read_text().strip())
        assert [path for path in runtime.iterdir() if path.is_socket()]
        pids = [process.pid for process in farm.processes()]
        farm.run("down")
        leaves_nothing(farm)
        assert not runtime.exists()
        assert not any(lives(pid) for pid in pids)
        for command in (["ps"], ["scale", "2"], ["down"], ["drain", "w1"], ["restart"]):
            assert "no farm is running" in farm.run(*command, expect=4).stderr
        ports = (farm.state / "ports.json").read_text()
        farm.run("up", "--workers", "2", "--json")
        assert (farm.state / "ports.json").read_text() == ports, "the block is kept"
        assert set(farm.states()) == {"w1", "w2"}


def test_down_lets_requests_finish() -> None:
    with new_farm(workers="count = 1") as farm:
        farm.run("up")
        answers: list[int] = []

        def call() -> None:
            answers.append(httpx.post(f"{farm.url}/work?seconds=2", timeout=20).status_code)

        thread = threading.Thread(target=call)
        thread.start()
        until(lambda: _is_busy(farm), "the request is being worked on")
        farm.run("down")
        thread.join(20)
        assert answers == [200]
        leaves_nothing(farm)


def _is_busy(farm: FarmUnderTest) -> bool:
    port = farm.workers()["w1"]["port"]
    try:
        httpx.get(f"http://127.0.0.1:{port}/v1/health", timeout=0.3)
    except httpx.TimeoutException:
        return True
    return False


def test_down_after_the_supervisor_was_killed() -> None:
    with new_farm() as farm, psutil.Popen(["sleep", "100"]) as stranger:
        try:
            farm.run("up")
            os.kill(farm.pid_of("launcher.supervision.run_supervisord"), signal.SIGKILL)
            assert httpx.post(f"{farm.url}/work").status_code == 200, "requests still flow"
            farm.run("down")
            leaves_nothing(farm)
            assert lives(stranger.pid)
        finally:
            stranger.kill()


def test_two_farms_side_by_side() -> None:
    with new_farm() as one, new_farm() as two:
        # One home for both, as two farms of one user have it.
        shutil.rmtree(two.folder.parent / "home", ignore_errors=True)
        home = one.folder.parent / "home"
        home.mkdir(exist_ok=True)
        (two.folder.parent / "home").symlink_to(home)
        one.run("up")
        two.run("up")
        blocks = [set(json.loads((f.state / "ports.json").read_text())) for f in (one, two)]
        assert blocks[0].isdisjoint(blocks[1])
        pids = two.pids()
        with two.load() as load:
            one.run("scale", "4")
            one.run("restart")
            one.run("down")
        load.check()
        assert two.pids() == pids
        leaves_nothing(one)


def test_a_worker_that_cannot_load_fails_once_and_clearly() -> None:
    with new_farm(workers="count = 3", options=("--fail", "weights are missing")) as farm:
        failed = farm.run("up", expect=1)
        assert "w1 could not load: weights are missing" in failed.stderr
        assert "the farm was shut down" in failed.stderr
        assert failed.stderr.count("weights are missing") == 1
        assert (farm.state / "logs/w1.log").read_text().count("weights") == 1
        assert farm.processes() == []
        assert not listens(farm.port)
        farm.run("ps", expect=4)
        farm.configure(external_server(farm.port, workers="count = 3"))
        farm.run("up")
        assert set(farm.states().values()) == {"ready"}


def test_up_reports_a_ready_url_that_is_answered_404() -> None:
    text = external_server(port := free_port(), workers="count = 1")
    text = text.replace("load_timeout = 30", "load_timeout = 3")
    with new_farm(re.sub(r'ready_url = "[^"]*"', 'ready_url = "/nowhere"', text)) as farm:
        farm.port = port
        message = farm.run("up", expect=1).stderr
        assert "w1 was not ready within 3 s: /nowhere (model.ready_url) returned 404" in message


def test_a_farm_is_not_replaced_from_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with new_farm(workers="count = 1") as farm:
        assert f"from {farm.folder / 'gpufarm.toml'}" in farm.run("up").stderr
        pids, home = farm.pids(), farm.folder
        farm.folder = tmp_path
        message = farm.run("up", "--state-dir", str(home / "state"), expect=2).stderr
        farm.folder = home
        assert f"was started from {home / 'gpufarm.toml'}" in message
        assert farm.pids() == pids


def test_a_slot_without_a_worker_cannot_be_drained() -> None:
    with new_farm(workers="count = 1") as farm:
        farm.run("up")
        assert "w2 has no worker to drain; workers: w1" in farm.run("drain", "w2", expect=2).stderr
        farm.run("drain", "w1")
        farm.run("drain", "w1")
        farm.run("restart", "w1")
        assert farm.states() == {"w1": "ready"}


def test_a_drained_farm_is_filled_again() -> None:
    with new_farm(workers="count = 1") as farm:
        farm.run("up")
        farm.run("drain", "w1")
        farm.run("up")
        assert farm.states() == {"w1": "stopped"}
        assert "w3 has no worker to restart" in farm.run("restart", "w3", expect=2).stderr
        farm.run("restart", "w1")
        assert farm.states() == {"w1": "ready"}


def test_a_count_and_a_maximum_that_change_together() -> None:
    with new_farm(external_server(port := free_port(), workers="count = 1")) as farm:
        farm.port = port
        farm.run("up")
        text = external_server(port, workers="count = 2")
        farm.configure(text.replace("max = 4", "max = 5"))
        farm.run("up")
        assert set(farm.states().values()) == {"ready"}
        assert len(farm.states()) == 2


def test_a_killed_farm_takes_a_count_that_has_changed_since() -> None:
    with new_farm(workers="count = 2") as farm:
        farm.run("up")
        farm.run("scale", "3")
        os.kill(farm.pid_of("launcher.supervision.run_supervisord"), signal.SIGKILL)
        farm.run("up")
        assert len(farm.states()) == 3, "what was scaled lasts until `down`"
        os.kill(farm.pid_of("launcher.supervision.run_supervisord"), signal.SIGKILL)
        farm.configure(external_server(farm.port, workers="count = 1"))
        farm.run("up")
        assert len(farm.states()) == 1, "the count in the file has changed since"


def test_another_host_on_the_running_farms_port_is_refused_with_the_reason() -> None:
    with new_farm(workers="count = 1") as farm:
        farm.run("up")
        message = farm.run("up", "--host", "0.0.0.0", expect=2).stderr
        assert "this farm's own nginx occupies" in message
        assert "gpufarm down" in message


def test_up_reports_a_command_that_does_not_exist() -> None:
    with new_farm() as farm:
        text = (farm.folder / "gpufarm.toml").read_text()
        farm.configure(text.replace(json.dumps(sys.executable), '"no-such-program"'))
        message = farm.run("up", expect=1).stderr
        assert "cannot run no-such-program" in message
        assert "model.command" in message


def test_a_port_in_use_is_one_line() -> None:
    with new_farm() as farm, socket.create_server(("127.0.0.1", farm.port)):
        message = farm.run("up", expect=2).stderr.splitlines()
        assert len(message) == 1
        assert f"port = {farm.port}" in message[0]
        assert "--port" in message[0]
        assert farm.processes() == []


def test_a_port_that_something_else_has_is_reported_and_waited_for() -> None:
    with new_farm(workers="count = 1") as farm:
        farm.run("up")
        port = farm.generation()["plan"]["slots"][1]["port"]
        control = Supervisor(farm.runtime / "supervisor.sock")

        def taken() -> socket.socket | None:
            control.release(port)  # only so, for it is held as long as the farm runs
            return _listener(port)

        server = until(taken, "the port is free for a moment", every=0.001)
        control.close()
        assert server is not None
        with server:
            until(lambda: "taken by" in (farm.ps()["problem"] or ""), "it is reported unasked")
            message = farm.run("scale", "2", expect=1).stderr
            assert "its port is taken by" in message
            assert str(port) in message
        farm.wait_for(w1="ready", w2="ready")


def _listener(port: int) -> socket.socket | None:
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError:
        return None


def test_the_foreground_shows_all_logs_and_drains_on_sigterm(tmp_path: Path) -> None:
    with new_farm() as farm:
        output = tmp_path / "output"
        with output.open("wb") as file:
            process = subprocess.Popen(
                farm.command("up", "--foreground"),
                cwd=farm.folder,
                env=farm.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        try:
            until(lambda: "workers are ready at" in output.read_text(), "it is ready")
            text = output.read_text()
            assert 'w1 | {"standin": "w1"' in text
            assert "controller | " in text
            assert "already runs" in farm.run("up", "-f", expect=1).stderr
            process.terminate()
            assert process.wait(30) == 0
            leaves_nothing(farm)
        finally:
            process.kill()
            process.wait()


def test_the_foreground_ends_with_1_when_nothing_can_be_loaded() -> None:
    with new_farm(options=("--fail", "no weights")) as farm:
        done = farm.run("up", "--foreground", expect=1)
        assert "could not load: no weights" in done.stdout
        leaves_nothing(farm)


@pytest.mark.parametrize("user", ["this user", "another user"])
def test_a_60_mb_body_goes_through(user: str) -> None:
    with new_farm(workers="count = 1") as farm:
        if user == "another user":
            hand_over(farm)
        farm.run("up")
        body = os.urandom(MEGABYTE) * 60
        answer = httpx.post(f"{farm.url}/size", content=body, timeout=60)
        assert answer.json() == {
            "bytes": 60 * MEGABYTE,
            "sha256": hashlib.sha256(body).hexdigest(),
        }
        farm.run("down")
        leaves_nothing(farm)


def hand_over(farm: FarmUnderTest) -> None:
    """Run the farm as an unprivileged user."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    base = farm.folder.parent
    (base / "home").mkdir(exist_ok=True)
    for path in [base, *base.rglob("*")]:
        shutil.chown(path, UNPRIVILEGED_USER, UNPRIVILEGED_USER)
    farm.command_prefix = (
        "setpriv",
        f"--reuid={UNPRIVILEGED_USER}",
        f"--regid={UNPRIVILEGED_USER}",
        "--clear-groups",
    )
    # This interpreter may lie in root's home; the system's runs the same packages.
    system = f"/usr/bin/python3.{sys.version_info.minor}"
    packages = sysconfig.get_paths()["purelib"]
    farm.more_environment = {"PYTHONPATH": f"{REPOSITORY}:{packages}"}
    for interpreter in (sys.executable, system):
        farm.interpreter = interpreter
        tried = subprocess.run(
            farm.python("-c", "import os, pydantic, aiohttp; os.stat(os.sys.executable)"),
            cwd=farm.folder,
            env=farm.environment,
            capture_output=True,
            check=False,
        )
        if tried.returncode == 0:
            text = (farm.folder / "gpufarm.toml").read_text()
            farm.configure(text.replace(json.dumps(sys.executable), json.dumps(interpreter)))
            return
    pytest.skip("no interpreter that another user may run")


def test_a_second_up_waits_for_the_same_workers() -> None:
    with new_farm(options=("--load-seconds", "2"), workers="count = 1") as farm:
        first = subprocess.Popen(farm.command("up"), cwd=farm.folder, env=farm.environment)
        try:
            until((farm.state / "farm.json").exists, "the first has begun")
            farm.run("up")
            assert first.wait(60) == 0
            assert [w["restarts"] for w in farm.workers().values()] == [0]
        finally:
            first.kill()
            first.wait()


def test_down_ends_a_farm_whose_up_still_waits() -> None:
    with new_farm(options=("--load-seconds", "60"), workers="count = 1") as farm:
        up = subprocess.Popen(
            farm.command("up"),
            cwd=farm.folder,
            env=farm.environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            until(lambda: farm.states() == {"w1": "starting"}, "it waits")
            farm.run("down")
            _, message = up.communicate(timeout=90)
            assert up.returncode == 1
            assert "stopped by another command" in message or "supervisord ended" in message
            leaves_nothing(farm)
        finally:
            up.kill()
            up.wait()


def test_another_port_and_more_slots_of_a_running_farm_restart_no_worker() -> None:
    with new_farm(workers="count = 1") as farm:
        farm.run("up")
        pids, old = farm.pids(), farm.port
        farm.port = free_port()
        farm.configure(external_server(farm.port, workers="count = 1"))
        farm.run("up")
        assert farm.pids() == pids, "nginx alone had to know"
        assert httpx.post(f"{farm.url}/work").status_code == 200
        until(lambda: not listens(old), "the old port is closed")
        text = external_server(farm.port, workers="count = 1").replace("max = 4", "max = 6")
        farm.configure(text)
        farm.run("up")
        assert farm.pids() == pids
        farm.run("scale", "6")
        assert len(farm.pids()) == 6
        assert httpx.post(f"{farm.url}/work").status_code == 200
        farm.configure(
            external_server(farm.port, workers="count = 1").replace("max = 4", "max = 2")
        )
        farm.run("up")
        assert len(farm.pids()) == 2, "what was scaled to is bounded by the new maximum"
        farm.run("down")
        leaves_nothing(farm)


def test_a_server_behind_a_shell_loses_nothing_and_leaves_nothing() -> None:
    with new_farm() as farm:
        text = (farm.folder / "gpufarm.toml").read_text()
        line = next(line for line in text.splitlines() if line.startswith("command"))
        words = json.loads(line.partition("=")[2])
        script = " ".join(words) + "; exit $?"
        farm.configure(text.replace(line, f"command = {json.dumps(['sh', '-c', script])}"))
        farm.run("up")
        with farm.load() as load:
            farm.run("restart")
            farm.run("scale", "1")
        load.check()
        shell = farm.pids()["w1"]
        server = psutil.Process(shell).children()[0].pid
        os.kill(shell, signal.SIGKILL)
        until(lambda: farm.pids().get("w1", shell) != shell, "a new worker")
        farm.wait_for(w1="ready")
        assert not lives(server), "what the shell left behind was ended first"
        farm.run("down")
        leaves_nothing(farm)


def test_the_deadline_of_a_load() -> None:
    text = external_server(
        port := free_port(), workers="count = 1", options=("--load-seconds", "60")
    )
    with new_farm(text.replace("load_timeout = 30", "load_timeout = 2")) as farm:
        farm.port = port
        assert "was not ready within 2 s" in farm.run("up", expect=1).stderr
        assert farm.processes() == []
