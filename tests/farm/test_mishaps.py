"""Mistakes of an operator and failures of the machine: the farm reports and survives them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import httpx
import psutil
import pytest

from balancer import processes
from tests.farm.harness import REPOSITORY, FarmUnderTest, lives, new_farm
from tests.farm.small_disk import FarmUnderTestAt, fill, small_disk
from tests.waiting import listens, until


def test_a_refused_configuration_changes_nothing_of_a_running_farm() -> None:
    with new_farm(workers="count = 1") as farm:
        farm.run("up")
        before = {path.name: path.read_text() for path in farm.state.glob("*.*") if path.is_file()}
        refused = farm.run("up", "--host", "nowhere.invalid", expect=2).stderr
        assert "host = nowhere.invalid: there is no such address" in refused
        address = farm.run("up", "--host", "203.0.113.1", expect=2).stderr
        assert "this machine does not have the address" in address
        farm.run("up", "--workers", "5", expect=3)
        after = {path.name: path.read_text() for path in farm.state.glob("*.*") if path.is_file()}
        assert after == before
        master = processes.running_master(farm.state)
        assert master is not None
        os.kill(master, signal.SIGKILL)
        until(lambda: processes.running_master(farm.state) not in (None, master), "a new nginx")
        until(lambda: listens(farm.port), "it serves")


@pytest.mark.parametrize("damage", ["{", '{"another": "version"}'])
def test_a_farm_whose_records_are_lost_can_be_ended_and_replaced(damage: str) -> None:
    with new_farm(workers="count = 1") as farm:
        farm.run("up")
        for name in ("farm.json", "generations/1.json"):
            (farm.state / name).write_text(damage)
            message = farm.run("ps", expect=1).stderr
            assert "lost or unreadable" in message
            assert "gpufarm down" in message
        farm.run("down")
        assert farm.processes() == []
        assert not listens(farm.port)
        farm.run("up")
        (farm.state / "farm.json").write_text(damage)
        farm.run("up")
        assert set(farm.states().values()) == {"ready"}
        assert (
            len(
                [
                    p
                    for p in farm.processes()
                    if "launcher.supervision.run_supervisord" in p.cmdline()
                ]
            )
            == 1
        )


@pytest.mark.parametrize("command", ["down", "up"])
def test_a_farm_whose_directory_was_removed_can_be_ended(command: str) -> None:
    with new_farm(workers="count = 1") as farm:
        farm.run("up")
        pids = [process.pid for process in farm.processes()]
        runtime = Path((farm.state / "runtime").read_text().strip())
        shutil.rmtree(farm.state)
        farm.run(command)
        if command == "down":
            assert not runtime.exists()
        until(lambda: not any(psutil.pid_exists(pid) for pid in pids), "nothing is left")


def test_nginx_is_known_without_its_record() -> None:
    with new_farm(workers="count = 1") as farm:
        farm.run("up")
        os.kill(farm.pid_of("launcher.supervision.run_supervisord"), signal.SIGKILL)
        (farm.state / processes.RECORD).unlink()
        old = processes.all_members(farm.state)
        assert old
        farm.run("up")
        until(lambda: not any(psutil.pid_exists(pid) for pid in old), "the old nginx has gone")


def test_an_invalid_desired_state_is_refused() -> None:
    with new_farm(workers="count = 1") as farm:
        farm.run("up")
        desired = farm.state / "desired.json"
        for nonsense in ('{"count": "many", "drained": 7}', "[1]", "nul"):
            desired.write_text(nonsense)
            old = farm.pid_of("launcher.controller")
            os.kill(old, signal.SIGKILL)
            farm.wait_for_another_controller(old)
            assert farm.states() == {"w1": "ready"}
        os.kill(farm.pid_of("launcher.supervision.run_supervisord"), signal.SIGKILL)
        desired.write_text('{"count": "many", "drained": 7}')
        assert "no supervisor" in farm.run("ps", expect=4).stderr
        farm.run("up")
        assert farm.states() == {"w1": "ready"}


def test_a_full_disk_stops_neither_requests_nor_replacements() -> None:
    with new_farm(workers="count = 2") as farm, small_disk(farm.folder / "disk") as disk:
        farm.configure(
            (farm.folder / "gpufarm.toml").read_text().replace('"state"', '"disk/state"')
        )
        at = FarmUnderTestAt(farm.folder, farm.port)
        try:
            at.run("up")
            supervisor = at.pid_of("launcher.supervision.run_supervisord")
            fill(disk)
            message = at.run("scale", "1", expect=1).stderr
            assert "the disk is full" in message
            assert len(message.splitlines()) == 1
            victim = at.pids()["w1"]
            os.kill(victim, signal.SIGKILL)
            until(lambda: at.pids().get("w1") not in (None, victim), "a successor")
            at.wait_for(w1="ready", w2="ready")
            assert at.pid_of("launcher.supervision.run_supervisord") == supervisor
            assert httpx.post(f"{at.url}/work", timeout=20).status_code == 200
            assert "the disk is full" in json.dumps(at.admin("GET", "/workers").json()["problem"])
            (disk / "full").unlink()
            at.run("scale", "1")
        finally:
            at.end()
        assert at.processes() == []


MODEL = """
import os
import time

class Work:
    def setup(self, device):
        pass

    def predict(self, request):
        if request.get("poison"):
            os.abort()
        time.sleep(request.get("seconds", 0.01))
        return {}
"""


def with_own_workers(farm: FarmUnderTest, request_timeout: float, count: int = 2) -> None:
    (farm.folder / "work.py").write_text(MODEL)
    farm.configure(f"""
port = {farm.port}
state_dir = "state"
model.target = "work:Work"
footprint.bytes = "64MiB"
budget.ram = "8GiB"
[workers]
count = {count}
max = {count}
request_timeout = {request_timeout}
path = ["{REPOSITORY}"]
""")


def test_a_model_that_never_comes_back_is_replaced() -> None:
    with new_farm() as farm:
        with_own_workers(farm, request_timeout=1)
        farm.run("up")
        before = farm.pids()
        stuck = httpx.post(f"{farm.url}/predict", json={"seconds": 1000}, timeout=20)
        assert stuck.status_code == 504
        until(lambda: len(set(farm.pids().values()) - set(before.values())) == 1, "a successor")
        farm.wait_for(w1="ready", w2="ready")
        assert "a call of the model has not returned" in farm.run("logs").stdout
        assert httpx.post(f"{farm.url}/predict", json={}, timeout=20).status_code == 200


def test_a_process_that_hangs_is_replaced_under_load() -> None:
    with new_farm() as farm:
        with_own_workers(farm, request_timeout=1)
        farm.run("up")
        frozen = farm.pids()["w1"]
        os.kill(frozen, signal.SIGSTOP)
        until(lambda: farm.pids().get("w1") not in (None, frozen), "a successor", 60)
        farm.wait_for(w1="ready", w2="ready")
        assert "did not answer for" in farm.run("logs", "controller").stdout
        assert farm.workers()["w1"]["restarts"] == 1


def test_a_request_that_kills_its_worker_kills_no_more_than_two() -> None:
    with new_farm() as farm:
        with_own_workers(farm, request_timeout=10, count=4)
        farm.run("up")
        before = farm.pids()
        answer = httpx.post(f"{farm.url}/predict", json={"poison": True}, timeout=20)
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "request_ends_workers"
        # The second to end may have been the replacement of the first.
        assert len([pid for pid in before.values() if lives(pid)]) >= 2
        assert httpx.post(f"{farm.url}/predict", json={}, timeout=20).status_code == 200
        farm.wait_for(w1="ready", w2="ready", w3="ready", w4="ready")


def test_up_does_not_call_an_emptied_farm_ready() -> None:
    with new_farm(workers="count = 1") as farm:
        assert "Ready at" in farm.run("up").stdout
        farm.run("drain", "w1")
        message = farm.run("up").stdout
        assert "Ready at" not in message
        assert "no worker is desired" in message
        farm.run("restart", "w1")
        assert "Ready at" in farm.run("up").stdout
