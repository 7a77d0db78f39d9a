"""An external server as the worker: scaled, killed, replaced, while requests come in."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from balancer import processes as nginx_processes
from tests import promtool
from tests.farm.harness import FarmUnderTest, external_server, lives, new_farm, within
from tests.waiting import until

READY_SECONDS = 2.0
"""What a replacement may take beyond its load time; tests/standin.py loads in less than one."""
LOAD_SECONDS = 2.0


@pytest.fixture(scope="module")
def shared() -> Iterator[FarmUnderTest]:
    with new_farm() as farm:
        done = farm.run("up")
        assert "w1" in done.stdout
        assert "w2" in done.stdout
        assert f"curl {farm.url}" in done.stdout
        yield farm


@pytest.fixture
def farm(shared: FarmUnderTest) -> FarmUnderTest:
    """The shared farm with two workers that are ready, whatever the test before did."""
    view = until(lambda: shared.admin("GET", "/workers").json(), "the controller answers")
    for worker in view["workers"]:
        if worker["drained"]:
            shared.admin("POST", f"/workers/{worker['id']}/restart")
    shared.admin("PUT", "/workers", {"count": 2})
    until(
        lambda: (
            shared.admin("GET", "/workers").json()["settled"]
            and shared.states() == {"w1": "ready", "w2": "ready"}
        ),
        "two workers are ready",
    )
    return shared


def test_up_again_changes_nothing_and_is_quick(farm: FarmUnderTest) -> None:
    pids, begun = farm.pids(), time.monotonic()
    farm.run("up")
    assert within(5, begun)
    assert farm.pids() == pids


def test_ps_reports_every_worker_as_json(farm: FarmUnderTest) -> None:
    view = farm.ps()
    assert view["url"] == farm.url
    assert [worker["id"] for worker in view["workers"]] == ["w1", "w2"]
    for worker in view["workers"]:
        assert worker["state"] == "ready"
        assert lives(worker["pid"])
        assert 10_000 < worker["port"] < 32768
        assert worker["device"] == "cpu"
        assert worker["memory_bytes"] > 1_000_000
        assert worker["restarts"] >= 0


def test_the_plan_of_the_running_farm(farm: FarmUnderTest) -> None:
    plan = json.loads(farm.run("plan", "--json").stdout)
    assert plan["devices"][0]["workers"] == 2
    assert plan["total_workers"] == 2
    assert farm.admin("GET", "/plan").json()["capacity"] == 4


def test_scaling_and_restarting_under_load_lose_nothing(farm: FarmUnderTest) -> None:
    before = farm.pids()
    with farm.load() as load:
        farm.run("scale", "1")
        assert list(farm.states()) == ["w1"]
        farm.run("scale", "2")
        farm.run("scale", "4")
        farm.run("restart")
        farm.run("scale", "2")
        farm.run("restart", "w1")
    load.check(at_least=100)
    after = farm.pids()
    assert set(after) == {"w1", "w2"}
    assert set(after.values()).isdisjoint(before.values())
    assert {"w1", "w2", "w3", "w4"} <= set(load.workers)


def test_a_restart_where_every_slot_is_taken(farm: FarmUnderTest) -> None:
    farm.run("scale", "4")
    pids = farm.pids()
    with farm.load() as load:
        farm.run("restart")
    load.check()
    assert set(farm.pids().values()).isdisjoint(pids.values())


def test_a_killed_worker_is_replaced_and_no_caller_notices(farm: FarmUnderTest) -> None:
    pid, restarts = farm.pids()["w1"], farm.workers()["w1"]["restarts"]
    with farm.load(clients=6) as load:
        begun = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        until(lambda: farm.pids().get("w1", pid) != pid, "a new worker")
        farm.wait_for(w1="ready")
        assert within(LOAD_SECONDS + READY_SECONDS, begun)
    load.check()
    assert farm.workers()["w1"]["restarts"] == restarts + 1
    metrics = httpx.get(f"{farm.url}/metrics").text
    assert 'gpufarm_worker_restarts_total{reason="crash"}' in metrics


def test_all_workers_killed_at_once_come_back(farm: FarmUnderTest) -> None:
    for pid in farm.pids().values():
        os.kill(pid, signal.SIGKILL)
    answer = httpx.post(f"{farm.url}/work")
    assert answer.status_code in (200, 503)
    until(lambda: farm.states() != {"w1": "ready", "w2": "ready"}, "it is noticed", every=0.01)
    farm.wait_for(w1="ready", w2="ready")
    assert httpx.post(f"{farm.url}/work").status_code == 200


def test_a_restarted_controller_keeps_the_desired_state(farm: FarmUnderTest) -> None:
    farm.run("scale", "3")
    pids, controller = farm.pids(), farm.pid_of("launcher.controller")
    with farm.load() as load:
        os.kill(controller, signal.SIGKILL)
        farm.wait_for_another_controller(controller)
    load.check()
    assert farm.pids() == pids
    assert farm.admin("GET", "/workers").json()["count"] == 3


def test_a_worker_that_dies_while_the_controller_is_away(farm: FarmUnderTest) -> None:
    pid, controller = farm.pids()["w2"], farm.pid_of("launcher.controller")
    with farm.load() as load:
        os.kill(controller, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        until(lambda: farm.pids().get("w2", pid) != pid, "a new worker")
        farm.wait_for(w2="ready")
    load.check()


def test_a_busy_server_whose_health_path_blocks_is_never_evicted(farm: FarmUnderTest) -> None:
    """Not even by a controller that has just come back and never saw it answer."""
    pids, controller = farm.pids(), farm.pid_of("launcher.controller")
    with farm.load("/work?seconds=2.5", clients=2) as load:
        os.kill(controller, signal.SIGKILL)
        farm.wait_for_another_controller(controller)
        assert farm.states() == {"w1": "ready", "w2": "ready"}
    assert farm.pids() == pids
    load.check(at_least=2)


@pytest.mark.parametrize("who", ["process", "master"])
def test_a_killed_nginx_is_back_soon(farm: FarmUnderTest, who: str) -> None:
    master = nginx_processes.running_master(farm.state)
    assert master is not None
    others = [pid for pid in nginx_processes.all_members(farm.state) if pid != master]
    with farm.load(clients=4) as load:
        begun = time.monotonic()
        os.kill(master if who == "master" else others[0], signal.SIGKILL)
        if who == "master":
            until(
                lambda: nginx_processes.running_master(farm.state) not in (None, master),
                "a new master",
            )
        until(lambda: httpx.post(f"{farm.url}/work").status_code == 200, "service is back")
        assert within(10, begun)  # 0.6 s on an idle machine
    assert set(load.statuses) == {200}
    # Each client had one request on the way. Without a master the port is closed for a moment.
    broken = [error for error in load.errors if who == "process" or "refused" not in error]
    assert len(broken) <= 4, load.errors


def test_drain_keeps_the_slot_empty_until_it_is_refilled(farm: FarmUnderTest) -> None:
    with farm.load() as load:
        farm.run("drain", "w1")
        assert farm.states() == {"w1": "stopped", "w2": "ready"}
        farm.run("up")
        assert farm.states()["w1"] == "stopped"
        farm.run("restart", "w1")
        assert farm.states() == {"w1": "ready", "w2": "ready"}
    load.check()


def test_more_than_memory_allows_is_refused_with_the_numbers(farm: FarmUnderTest) -> None:
    refused = farm.run("scale", "5", expect=3)
    assert "workers.max = 4" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert farm.admin("GET", "/workers").json()["count"] == 2


def test_more_than_the_cores_works_with_one_warning(farm: FarmUnderTest) -> None:
    done = farm.run("scale", "4")
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning")]
    assert len(warnings) == ((os.cpu_count() or 1) < 4)
    assert len(farm.ps()["workers"]) == 4


def test_no_worker_is_503_and_never_502(farm: FarmUnderTest) -> None:
    farm.run("scale", "0")
    for path in ("/work", "/v1/models", "/readyz"):
        answer = httpx.get(farm.url + path)
        assert answer.status_code == 503
        assert "Retry-After" in answer.headers
    assert httpx.get(f"{farm.url}/livez").status_code == 200


def test_a_full_server_is_429_beside_empty_slots(farm: FarmUnderTest) -> None:
    for _ in range(12):
        answer = httpx.post(f"{farm.url}/status/429")
        assert answer.status_code == 429
        assert "Retry-After" in answer.headers


def test_health_and_metrics_of_the_whole_farm(farm: FarmUnderTest) -> None:
    health = httpx.get(f"{farm.url}/health").json()
    assert (health["status"], health["ready"], health["count"]) == ("ready", 2, 2)
    assert httpx.get(f"{farm.url}/readyz").json()["ready"] == 2
    metrics = httpx.get(f"{farm.url}/metrics").text
    assert 'gpufarm_workers{state="ready"} 2' in metrics
    assert 'gpufarm_worker_memory_bytes{worker="w1"}' in metrics


def test_a_page_that_is_not_metrics_is_left_out_and_reported_once(farm: FarmUnderTest) -> None:
    def reports() -> list[int]:
        log = farm.run("logs", "-n", "1000").stdout
        text = "its /metrics is not in Prometheus's text format"
        return [log.count(f"{worker}: {text}") for worker in ("w1", "w2")]

    promtool.check(httpx.get(f"{farm.url}/metrics").text)
    first = reports()  # one for each controller that this farm has had
    assert all(first)
    for _ in range(3):
        metrics = httpx.get(f"{farm.url}/metrics").text
        assert "margin" not in metrics
        promtool.check(metrics)
    assert reports() == first


def test_the_admin_interface_refuses_what_makes_no_sense(farm: FarmUnderTest) -> None:
    assert httpx.put(f"{farm.url}/workers", json={"count": 1}).status_code == 404
    assert farm.admin("PUT", "/workers", {"count": -1}).status_code == 400
    assert farm.admin("PUT", "/workers", {"count": "many"}).status_code == 400
    assert farm.admin("POST", "/workers/w9/drain").status_code == 404
    assert farm.states() == {"w1": "ready", "w2": "ready"}


def test_logs_of_all_and_of_one(farm: FarmUnderTest) -> None:
    everything = farm.run("logs").stdout
    assert "controller | " in everything
    assert "w1 | " in everything
    one = farm.run("logs", "w1").stdout
    assert '{"standin": "w1"' in one
    assert " | " not in one
    assert "unknown process" in farm.run("logs", "w1x", expect=2).stderr


def test_an_unknown_worker_is_one_line(farm: FarmUnderTest) -> None:
    for command in ("drain", "restart"):
        message = farm.run(command, "w9", expect=2).stderr.splitlines()
        assert message == ["gpufarm: no worker w9; slots: w1, w2, w3, w4"]


def test_the_doctor_watches_a_stream(farm: FarmUnderTest) -> None:
    findings = {f["check"]: f for f in json.loads(farm.run("doctor", "--json").stdout)}
    assert findings["stream"]["ok"]
    assert "live and ready" in findings["stream"]["message"]


def test_a_changed_configuration_is_taken_over_without_a_loss(farm: FarmUnderTest) -> None:
    pids = farm.pids()
    try:
        with farm.load() as load:
            farm.configure(
                external_server(
                    farm.port, workers="count = 2", more='[balancer]\nbody_limit = "1KiB"'
                )
            )
            farm.run("up")
            assert farm.pids() == pids, "nginx alone had to know"
            until(
                lambda: httpx.post(f"{farm.url}/size", content=b"x" * 2000).status_code == 413,
                "the new limit",
            )
        # nginx before 1.27.4 may close an idle connection just as it is used again.
        assert set(load.statuses) == {200}
        assert len(load.errors) <= 4
        with farm.load() as load:
            farm.configure(external_server(farm.port, workers="count = 2\nthreads = 2"))
            farm.run("up")
        assert set(farm.pids().values()).isdisjoint(pids.values()), "workers had to know"
        assert set(load.statuses) == {200}
    finally:
        farm.configure(external_server(farm.port, workers="count = 2"))
        farm.run("up")


def test_a_restart_into_a_broken_configuration_keeps_what_works(farm: FarmUnderTest) -> None:
    pids = farm.pids()
    try:
        with farm.load() as load:
            farm.configure(
                external_server(farm.port, workers="count = 2", options=("--fail", "no weights"))
            )
            failed = farm.run("up", expect=1)
            assert "could not load: no weights" in failed.stderr
            assert farm.pids() == pids
        load.check()
    finally:
        farm.configure(external_server(farm.port, workers="count = 2"))
        farm.run("up")


def test_a_killed_supervisor_leaves_nothing_that_up_cannot_find(farm: FarmUnderTest) -> None:
    """Last, since it replaces everything: random order does not matter, `farm` mends it."""
    stranger = psutil.Popen(["sleep", "100"])
    old = [process.pid for process in farm.processes()]
    try:
        os.kill(farm.pid_of("launcher.supervision.run_supervisord"), signal.SIGKILL)
        farm.run("ps", expect=4)
        done = farm.run("up")
        assert "processes of an earlier farm" in done.stderr
        until(lambda: not any(lives(pid) for pid in old), "the old processes have gone")
        assert farm.states() == {"w1": "ready", "w2": "ready"}
        assert lives(stranger.pid)
    finally:
        stranger.kill()
        stranger.wait()
