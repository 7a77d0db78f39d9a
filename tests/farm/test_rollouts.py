"""Another configuration of the model is rolled out, or cannot be."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.farm.harness import FarmUnderTest, new_farm
from tests.farm.models import WORK, configuration, serve_work
from tests.waiting import until

BROKEN = {
    "an import error": "import no_such_module\n",
    "an exception in setup": WORK.replace("self.version = VERSION", "raise RuntimeError('no GPU')"),
}


def versions(farm: FarmUnderTest, calls: int = 12) -> set[int]:
    def call(_: int) -> int:
        answer = httpx.post(f"{farm.url}/predict", json={"seconds": 0.05}, timeout=20)
        return int(answer.json()["version"])

    with ThreadPoolExecutor(4) as pool:
        return set(pool.map(call, range(calls)))


def killed_and_back(farm: FarmUnderTest, id_: str) -> None:
    old = farm.pids()[id_]
    os.kill(old, signal.SIGKILL)
    until(lambda: farm.pids().get(id_) not in (None, old), f"{id_} is replaced")
    farm.wait_for(**{id_: "ready"})


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_a_model_that_cannot_load_is_refused_and_the_old_one_comes_back_after_crashes(
    broken: str,
) -> None:
    with new_farm() as farm:
        serve_work(farm, workers="count = 3\nmax = 4")
        farm.run("up")
        good = (farm.folder / "gpufarm.toml").read_text()
        (farm.folder / "next.py").write_text(broken)
        farm.configure(good.replace("work:Work", "next:Work"))
        with farm.load("/predict", clients=3) as load:
            message = farm.run("up", expect=1).stderr
            assert "the restart was given up" in message
            assert "stays in force" in message
            for id_ in ("w1", "w2", "w3"):
                killed_and_back(farm, id_)
        load.check()
        assert versions(farm) == {1}
        view = farm.ps()
        assert view["generation"]["failure"]
        assert view["generation"]["candidate"] is None
        assert all(worker["current"] for worker in view["workers"])
        assert "given up" in farm.run("ps").stdout
        assert "given up" in farm.run("doctor", expect=1).stdout
        assert httpx.get(f"{farm.url}/health").json()["status"] == "degraded"
        (farm.folder / "next.py").write_text(WORK.replace("VERSION = 1", "VERSION = 2"))
        farm.run("up")
        assert versions(farm) == {2}
        assert farm.ps()["generation"]["failure"] is None
        assert httpx.get(f"{farm.url}/health").json()["status"] == "ready"


def test_an_edited_model_is_rolled_out_by_up() -> None:
    with new_farm() as farm:
        serve_work(farm)
        farm.run("up")
        assert versions(farm) == {1}
        before = farm.pids()
        farm.run("up")
        assert farm.pids() == before, "nothing has changed"
        (farm.folder / "work.py").write_text(WORK.replace("VERSION = 1", "VERSION = 2"))
        with farm.load("/predict", clients=3) as load:
            assert "the model's files have changed" in farm.run("up").stderr
        load.check()
        assert versions(farm) == {2}


def test_a_load_that_fails_for_a_while_is_tried_until_it_succeeds() -> None:
    with new_farm() as farm:
        serve_work(farm)
        farm.run("up")
        (farm.folder / "broken").touch()
        old = farm.pids()["w1"]
        with farm.load("/predict", clients=2) as load:
            os.kill(old, signal.SIGKILL)
            until(lambda: farm.workers()["w1"]["restarts"] >= 2, "it has been tried again")
            error = farm.workers()["w1"]["error"]
            assert "the weights cannot be read just now" in error
            assert farm.states()["w2"] == "ready"
            (farm.folder / "broken").unlink()
            farm.wait_for(w1="ready", w2="ready")
        load.check()
        assert farm.workers()["w1"]["error"] is None


def test_a_module_that_is_away_for_a_while_is_no_outage() -> None:
    """A worker ends with 3 then, which means "for good" only where none has ever been ready."""
    with new_farm() as farm:
        serve_work(farm)
        farm.run("up")
        (farm.folder / "work.py").rename(farm.folder / "away.py")
        for pid in farm.pids().values():
            os.kill(pid, signal.SIGKILL)
        until(lambda: farm.workers()["w1"]["restarts"] >= 2, "it has been tried again")
        assert farm.states()["w1"] != "failed"
        (farm.folder / "away.py").rename(farm.folder / "work.py")
        farm.wait_for(w1="ready", w2="ready")
        assert versions(farm) == {1}


def test_a_model_that_never_loads_is_reported_and_ends_the_first_up() -> None:
    with new_farm() as farm:
        serve_work(farm)
        (farm.folder / "broken").touch()
        begun = time.monotonic()
        message = farm.run("up", expect=1).stderr
        assert "the weights cannot be read just now" in message
        assert "the farm was shut down" in message
        assert time.monotonic() - begun < 90
        assert farm.processes() == []


def test_a_rollout_to_fewer_workers_of_another_model() -> None:
    with new_farm() as farm:
        serve_work(farm, workers="count = 4\nmax = 4")
        farm.run("up")
        (farm.folder / "next.py").write_text(WORK.replace("VERSION = 1", "VERSION = 2"))
        farm.configure(configuration(farm, target="next:Work", workers="count = 2\nmax = 4"))
        with farm.load("/predict", clients=3) as load:
            farm.run("up")
        load.check()
        assert set(farm.states()) == {"w1", "w2"}
        assert versions(farm) == {2}
