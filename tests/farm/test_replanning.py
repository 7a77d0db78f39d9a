"""A running farm is given another plan: fewer workers, more, other limits, another count."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from tests.farm.harness import FarmUnderTest, external_server, new_farm
from tests.farm.models import serve_work
from tests.waiting import until


def resize(farm: FarmUnderTest, memory: str, external: bool) -> None:
    """Configure as many workers as the memory allows."""
    budget = f'memory = "{memory}"\ncores = 16'
    if external:
        farm.configure(
            external_server(
                farm.port, f"memory = {memory!r}\ncores = 16", 'count = "auto"'
            ).replace("max = 4", "max = 8")
        )
    else:
        serve_work(farm, workers='count = "auto"\nmax = 8', budget=budget)


@pytest.mark.parametrize("external", [False, True], ids=["own workers", "an external server"])
def test_a_plan_that_shrinks_drains_what_it_has_no_slot_for(external: bool) -> None:
    with new_farm() as farm:
        resize(farm, "512MiB", external)
        farm.run("up")
        assert len(farm.pids()) == 8
        kept = {id_: pid for id_, pid in farm.pids().items() if id_ in ("w1", "w2", "w3")}
        path = "/work?seconds=0.02" if external else "/predict"
        with farm.load(path) as load:
            resize(farm, "200MiB", external)
            farm.run("up")
            assert farm.pids() == kept, "three go on, the others have ended"
            os.kill(kept["w2"], signal.SIGKILL)
            until(lambda: farm.pids().get("w2") not in (None, kept["w2"]), "it is replaced")
            farm.wait_for(w1="ready", w2="ready", w3="ready")
            resize(farm, "512MiB", external)
            farm.run("up")
            assert len(farm.pids()) == 8
        load.check()
        farm.run("down")


def test_a_plan_shrinks_below_a_drained_slot() -> None:
    with new_farm() as farm:
        resize(farm, "512MiB", external=True)
        farm.run("up")
        farm.run("drain", "w5")
        farm.run("drain", "w1")
        resize(farm, "200MiB", external=True)
        farm.run("up")
        assert farm.states() == {"w1": "stopped", "w2": "ready", "w3": "ready"}
        farm.run("restart", "w1")
        assert set(farm.states().values()) == {"ready"}


def test_a_plan_that_is_refused_changes_nothing() -> None:
    with new_farm() as farm:
        resize(farm, "200MiB", external=True)
        farm.run("up")
        before = farm.pids()
        files = {p: p.read_bytes() for p in farm.state.glob("*.*") if p.is_file()}
        farm.configure(
            (farm.folder / "gpufarm.toml").read_text().replace('"auto"', "6").replace("8\n", "9\n")
        )
        assert "do not fit" in farm.run("up", expect=3).stderr
        assert {p: p.read_bytes() for p in farm.state.glob("*.*") if p.is_file()} == files
        assert farm.pids() == before


def test_limits_that_change_replace_workers_in_turn_and_lose_nothing() -> None:
    with new_farm() as farm:
        serve_work(farm, workers="count = 2\nmax = 3")
        farm.run("up")
        before = farm.pids()
        supervisor = farm.pid_of("launcher.supervision.run_supervisord")
        with farm.load("/predict") as load:
            text = (farm.folder / "gpufarm.toml").read_text()
            farm.configure(text.replace("max = 3", "max = 6") + "[logs]\nbackups = 5\n")
            farm.run("up")
            assert farm.pids() == before, "neither concerns a worker"
            farm.configure(text.replace("request_timeout = 15", "request_timeout = 20"))
            farm.run("up")
        load.check()
        assert set(farm.pids()) == set(before)
        assert not set(farm.pids().values()) & set(before.values())
        assert farm.pid_of("launcher.supervision.run_supervisord") == supervisor
        conf = (farm.state / "supervisord.conf").read_text()
        assert "stopwaitsecs = 35" in conf
        assert "process_name = w%(process_num)d\nnumprocs = 6" in conf, "ports are never given up"


def test_auto_follows_the_limits_until_scale_says_otherwise() -> None:
    def with_max(number: int, count: str = '"auto"') -> None:
        text = external_server(farm.port, "cores = 16", f"count = {count}")
        farm.configure(text.replace("max = 4", f"max = {number}"))

    with new_farm() as farm:
        for number in (5, 3, 5):
            with_max(number)
            farm.run("up")
            assert len(farm.pids()) == number
        farm.run("scale", "2")
        message = farm.run("up").stderr
        assert "workers: 2, as set by `gpufarm scale`; the configuration gives 5" in message
        assert len(farm.pids()) == 2
        farm.run("scale", "0")
        farm.run("up")
        assert farm.pids() == {}
        farm.run("scale", "auto")
        assert len(farm.pids()) == 5
        farm.run("scale", "1")
        with_max(5, "3")
        farm.run("up")
        assert len(farm.pids()) == 3, "the count in the file has changed since"
        assert "must be a whole number" in farm.run("scale", "many", expect=2).stderr


def test_of_two_scales_at_once_the_loser_says_so() -> None:
    with new_farm(workers="count = 1", options=("--load-seconds", "1")) as farm:
        farm.run("up")
        first = subprocess.Popen(
            farm.command("scale", "3"),
            cwd=farm.folder,
            env=farm.environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        until(lambda: farm.admin("GET", "/workers").json()["count"] == 3, "the first was heard")
        farm.run("scale", "2")
        _, message = first.communicate(timeout=60)
        assert first.returncode == 1
        assert "requested 3 workers, but another command has set 2" in message
