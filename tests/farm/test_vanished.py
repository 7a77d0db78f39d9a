"""What a farm needs is gone: its sockets, its supervisor, its records, its logs, its disk."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import suppress

import httpx
import psutil
import pytest

from tests.farm.harness import FarmUnderTest, lives, new_farm
from tests.farm.models import serve_work
from tests.farm.small_disk import FarmUnderTestAt, fill, small_disk
from tests.farm.test_life import leaves_nothing
from tests.waiting import until

SUPERVISOR = "launcher.supervision.run_supervisord"


def remove_sockets(farm: FarmUnderTest) -> None:
    """As a cleaner of temporary files would, or a logout of ``$XDG_RUNTIME_DIR``."""
    folder = farm.runtime
    for path in folder.glob("*.sock"):
        path.unlink()
    if folder.parent != farm.state:
        shutil.rmtree(folder)


@pytest.mark.parametrize("command", ["up", "ps", "scale", "down"])
def test_sockets_that_were_removed_come_back(command: str) -> None:
    with new_farm(workers="count = 2") as farm:
        farm.run("up")
        pids, supervisor = farm.pids(), farm.pid_of(SUPERVISOR)
        remove_sockets(farm)
        if command == "down":
            farm.run("down")
            leaves_nothing(farm)
            return
        with farm.load() as load:
            farm.run(*(["scale", "2"] if command == "scale" else [command]))
        load.check()
        assert farm.pids() == pids, "no worker was touched"
        assert farm.pid_of(SUPERVISOR) == supervisor
        farm.run("down")
        leaves_nothing(farm)


@pytest.mark.parametrize("command", ["up", "down"])
def test_a_killed_supervisor_without_sockets_and_records_leaves_no_orphans(command: str) -> None:
    with new_farm(workers="count = 3") as farm:
        farm.run("up")
        old = [process.pid for process in farm.processes()]
        os.kill(farm.pid_of(SUPERVISOR), signal.SIGKILL)
        remove_sockets(farm)
        for name in ("runtime", "farm.json", "desired.json", "run/nginx-masters.json"):
            with suppress(FileNotFoundError):
                (farm.state / name).unlink()
        farm.run(command)
        assert not [pid for pid in old if lives(pid)]
        if command == "down":
            leaves_nothing(farm)
        else:
            assert set(farm.states().values()) == {"ready"}
            assert httpx.post(f"{farm.url}/work").status_code == 200


def test_a_process_that_cannot_be_ended_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel keeps one that hangs in it; here a signal is withheld instead."""
    from launcher.supervision import leftovers

    with new_farm(workers="count = 1") as farm:
        farm.run("up")
        pid = farm.pids()["w1"]
        os.kill(farm.pid_of(SUPERVISOR), signal.SIGKILL)
        monkeypatch.setattr(leftovers, "_send", lambda process, number: None)
        monkeypatch.setattr(leftovers, "KILLED_SECONDS", 0.2)
        with pytest.raises(leftovers.StillRunningError, match=str(pid)):
            leftovers.clean(farm.state, graceful_seconds=0.2)
        monkeypatch.undo()
        farm.run("down")
        leaves_nothing(farm)


def test_a_full_disk_and_a_dead_supervisor_end_nothing_that_serves() -> None:
    with new_farm(workers="count = 2") as farm, small_disk(farm.folder / "disk") as disk:
        text = (farm.folder / "gpufarm.toml").read_text().replace('"state"', '"disk/state"')
        farm.configure(text)
        at = FarmUnderTestAt(farm.folder, farm.port)
        try:
            at.run("up")
            pids = at.pids()
            os.kill(at.pid_of(SUPERVISOR), signal.SIGKILL)
            fill(disk)
            at.configure(text.replace("request_timeout = 15", "request_timeout = 16"))
            message = at.run("up", expect=1).stderr
            assert "the disk is full" in message
            assert all(lives(pid) for pid in pids.values())
            assert httpx.post(f"{at.url}/work", timeout=20).status_code == 200
            (disk / "full").unlink()
            with suppress(AssertionError):
                at.run("up")
            at.run("up")
            assert set(at.states().values()) == {"ready"}
            assert not any(lives(pid) for pid in pids.values())
        finally:
            at.end()
        assert at.processes() == []


def test_an_order_that_did_not_reach_the_supervisor_is_given_again() -> None:
    with new_farm(workers="count = 3") as farm:
        farm.run("up")
        supervisor = psutil.Process(farm.pid_of(SUPERVISOR))
        victim = farm.pids()["w3"]
        supervisor.suspend()
        try:
            assert farm.admin("PUT", "/workers", {"count": 2}).status_code == 200
            until(lambda: farm.admin("GET", "/workers").json()["problem"], "it is not heard")
        finally:
            supervisor.resume()
        until(lambda: not lives(victim), "w3 is drained after all")
        until(lambda: farm.admin("GET", "/workers").json()["settled"], "all is done")
        assert farm.states() == {"w1": "ready", "w2": "ready"}


def test_a_controller_that_dies_between_decision_and_action_is_made_up_for() -> None:
    """Its memory says "draining" and "starting", and supervisord never heard of it."""
    import json

    with new_farm(workers="count = 3") as farm:
        farm.run("up")
        controller = psutil.Process(farm.pid_of("launcher.controller"))
        controller.suspend()
        file = farm.state / "desired.json"
        data = json.loads(file.read_text())
        records = data["memory"]["records"]
        records["w2"]["state"] = "draining"
        records["w4"] = {**records["w1"], "state": "starting", "pid": 0, "crashes": 0}
        data["count"] = 4
        file.write_text(json.dumps(data))
        controller.kill()
        farm.wait_for(w1="ready", w2="ready", w3="ready", w4="ready")
        assert sum(worker["restarts"] for worker in farm.workers().values()) == 0


def test_ten_thousand_requests_while_everything_happens() -> None:
    """A plan that shrinks, a rollout that fails with kills, sockets and logs that vanish."""
    with new_farm() as farm:
        serve_work(farm, workers="count = 6\nmax = 6")
        farm.run("up")
        good = (farm.folder / "gpufarm.toml").read_text()
        (farm.folder / "next.py").write_text("import no_such_module\n")
        with farm.load("/predict", clients=8, body=b'{"seconds": 0.001}') as load:
            farm.configure(good.replace("count = 6", "count = 4"))
            farm.run("up")
            remove_sockets(farm)
            farm.run("up")
            for log in (farm.state / "logs").glob("*.log"):
                log.unlink()
            farm.configure(good.replace("count = 6", "count = 4").replace("work:Work", "next:Work"))
            assert "given up" in farm.run("up", expect=1).stderr
            for id_ in ("w1", "w2", "w3", "w4"):
                old = farm.pids()[id_]
                os.kill(old, signal.SIGKILL)
                until(lambda: farm.pids().get(id_) not in (None, old), "it is replaced")  # noqa: B023
                farm.wait_for(w1="ready", w2="ready", w3="ready", w4="ready")
            farm.configure(good.replace("count = 6", "count = 3"))
            farm.run("up")
            until(lambda: load.count >= 10_000, "ten thousand requests", seconds=120)
        load.check(at_least=10_000)
        until((farm.state / "logs/nginx-access.log").exists, "the log is there again")
        until((farm.state / "logs/w1.log").exists, "the log is there again")
