"""Candidates that cannot serve: the old workers stay, and come back as they were."""

from __future__ import annotations

import pytest

from launcher.controller.model import BLOCKED_SECONDS, MAX_EARLY_CRASHES
from launcher.controller.reconcile import MAX_BACKOFF
from tests.launcher.controller.world import LOAD_TIMEOUT, NEVER, STEP, Version, World, running

FAILURES = {
    "cannot load": ({"new": 3}, 5.0, "could not load: no such file"),
    "crashes early": ({"new": 1}, 5.0, "times before it was ready, last with exit code 1"),
    "is never ready": ({}, NEVER, f"was not ready within {LOAD_TIMEOUT:g} s"),
}


@pytest.fixture(params=FAILURES)
def failure(request: pytest.FixtureRequest) -> tuple[dict[str, int], float, str]:
    return FAILURES[request.param]


def fail(world: World, failure: tuple[dict[str, int], float, str], **changes: int) -> Version:
    """Roll out a version that fails in this way."""
    world.fails, load_seconds, _ = failure
    version = Version("new", **changes, load_seconds=load_seconds)  # type: ignore[arg-type]
    world.roll_out(version)
    return version


@pytest.mark.parametrize(("slots", "count"), [(4, 2), (2, 2), (1, 1), (3, 3)])
def test_a_candidate_that_cannot_serve_is_given_up_and_the_old_workers_serve_on(
    failure: tuple[dict[str, int], float, str], slots: int, count: int
) -> None:
    world = running(Version(slots=slots, count=count))
    pids = world.pids()
    fail(world, failure, slots=slots, count=count)
    world.run_until_settled()
    assert world.verdicts == ["given up"]
    assert world.current.name == "old"
    assert failure[2] in world.memory.rollout.error
    assert world.memory.rollout.error.startswith("the restart was given up: w")
    assert set(world.specs().values()) == {"old@gpu0"}
    assert len(world.ready()) == count
    assert all(world.memory.of(id_).error == "" for id_ in world.ready())
    spare = slots > count
    assert world.fewest_ready == count - (not spare)
    if spare:
        assert world.pids() == pids
    world.run(LOAD_TIMEOUT + MAX_BACKOFF)
    assert world.started_specs.count("new@gpu0") <= MAX_EARLY_CRASHES, "it is not tried any more"


def test_a_worker_that_crashes_during_the_trial_comes_back_as_it_was(
    failure: tuple[dict[str, int], float, str],
) -> None:
    world = running(Version(slots=4, count=3))
    fail(world, failure, slots=4, count=3)
    world.run(2)
    world.crash("w1")
    world.crash("w3")
    world.run_until_settled()
    assert world.verdicts == ["given up"]
    assert world.specs() == {f"w{n}": "old@gpu0" for n in (1, 2, 3)}
    assert world.fewest_ready >= 1
    others = zip(world.started, world.started_specs, strict=True)
    assert {spec for id_, spec in others if id_ != "w4"} == {"old@gpu0"}


def test_a_crash_between_two_tries_of_the_candidate_is_repaired_with_the_old_spec() -> None:
    """A trial may take long; the crashed worker does not wait for its end."""
    world = running(Version(slots=3, count=2))
    fail(world, ({"new": 1}, 5.0, ""), slots=3, count=2)
    while world.memory.of("w3").crashes < 1:
        world.run(STEP)
    world.crash("w1")
    world.crash("w2")
    world.run(8)
    assert world.candidate is not None, "the trial goes on"
    assert "old@gpu0" in world.started_specs
    world.run_until_settled()
    assert world.verdicts == ["given up"]
    assert world.specs() == {"w1": "old@gpu0", "w2": "old@gpu0"}


def test_a_crash_with_no_spare_slot_during_the_trial_comes_back_as_it_was(
    failure: tuple[dict[str, int], float, str],
) -> None:
    world = running(Version(slots=3, count=3))
    fail(world, failure, slots=3, count=3)
    world.run(4)
    assert world.state("w1") == "starting"
    world.crash("w3")
    world.run_until_settled()
    assert world.verdicts == ["given up"]
    assert world.specs() == {f"w{n}": "old@gpu0" for n in (1, 2, 3)}
    others = zip(world.started, world.started_specs, strict=True)
    assert {spec for id_, spec in others if id_ != "w1"} == {"old@gpu0"}
    assert world.fewest_ready >= 1


def test_after_a_refused_rollout_each_crash_brings_the_old_one_back(
    failure: tuple[dict[str, int], float, str],
) -> None:
    world = running(Version(slots=3, count=3))
    fail(world, failure, slots=3, count=3)
    world.run_until_settled()
    world.started_specs.clear()
    for id_ in ("w1", "w2", "w3"):
        world.crash(id_)
        world.run(12)
    assert world.started_specs == ["old@gpu0"] * 3
    assert len(world.ready()) == 3


def test_what_fails_on_one_of_two_devices_is_taken_back_everywhere() -> None:
    world = running(Version(slots=4, count=4, devices=("gpu0", "gpu1")))
    world.fails = {"new@gpu1": 3}
    world.roll_out(Version("new", slots=4, count=4, devices=("gpu0", "gpu1")))
    world.run_until_settled()
    assert world.verdicts == ["given up"]
    assert "new@gpu0" in world.started_specs
    assert set(world.specs().values()) == {"old@gpu0", "old@gpu1"}
    assert len(world.ready()) == 4
    assert world.fewest_ready >= 2
    assert "w2 could not load" in world.memory.rollout.error, "why stays until the next one"


def test_a_failed_candidate_with_more_slots_leaves_none_of_them(
    failure: tuple[dict[str, int], float, str],
) -> None:
    world = running(Version(slots=2, count=2))
    pids = world.pids()
    fail(world, failure, slots=4, count=4)
    world.run_until_settled()
    assert world.verdicts == ["given up"]
    assert world.pids() == pids
    assert set(world.memory.records) == {"w1", "w2"}
    assert world.fewest_ready == 2


def test_a_failed_candidate_with_fewer_slots_gives_the_others_back(
    failure: tuple[dict[str, int], float, str],
) -> None:
    world = running(Version(slots=4, count=4), room={"gpu0": 4})
    world.fails, load_seconds, _ = failure
    world.roll_out(Version("new", slots=2, count=2, need=2, load_seconds=load_seconds))
    world.run_until_settled()
    assert world.verdicts == ["given up"]
    assert world.specs() == {f"w{n}": "old@gpu0" for n in (1, 2, 3, 4)}
    assert world.fewest_ready >= 1


def test_the_only_worker_comes_back_when_the_candidate_needed_its_room(
    failure: tuple[dict[str, int], float, str],
) -> None:
    world = running(Version(slots=2, count=1), room={"gpu0": 1})
    fail(world, failure, slots=2, count=1)
    world.run_until_settled()
    assert world.verdicts == ["given up"]
    assert world.specs() == {"w1": "old@gpu0"}


def test_a_candidate_for_which_there_is_never_room_is_given_up() -> None:
    """Another tenant took the memory between the plan and the start."""
    world = running(Version(slots=3, count=3, devices=("gpu0",)), room={"gpu1": 0})
    world.roll_out(Version("old", slots=3, count=3, devices=("gpu1",)))
    world.run_until_settled()
    assert world.verdicts == ["given up"]
    assert "w1 cannot start: it needs 1, and 0 are free" in world.memory.rollout.error
    assert world.specs() == {f"w{n}": "old@gpu0" for n in (1, 2, 3)}
    assert world.fewest_ready == 2
    assert world.now < 400


def test_a_proven_candidate_goes_on_without_the_slot_for_which_there_is_no_room() -> None:
    world = running(Version(slots=3, count=3), room={"gpu0": 3})
    world.roll_out(Version("new", slots=3, count=3))
    while "new@gpu0" not in world.memory.proven:
        world.run(STEP)
    world.room = {"gpu0": 2}
    world.run_until_settled()
    assert world.verdicts == ["promoted"]
    assert world.fewest_ready >= 1
    assert set(world.specs().values()) == {"new@gpu0"}
    assert len(world.ready()) == 2
    world.room = {"gpu0": 3}
    world.run(20)
    assert len(world.ready()) == 3


def test_a_taken_port_of_the_spare_slot_does_not_hold_up_a_rollout() -> None:
    world = running(Version(slots=3, count=2), taken={"w3": "pid 42 (python)"})
    world.roll_out(Version("new", slots=3, count=2))
    world.run_until_settled()
    assert world.verdicts == ["promoted"]
    assert world.fewest_ready == 1


def test_a_taken_port_of_a_replaced_worker_ends_the_rollout() -> None:
    world = running(Version(slots=2, count=2))
    world.roll_out(Version("new", slots=2, count=2))
    world.step()
    world.taken["w1"] = "pid 42 (python)"
    world.run(BLOCKED_SECONDS + 10)
    assert world.verdicts == ["given up"]
    assert world.specs() == {"w2": "old@gpu0"}
    world.run(BLOCKED_SECONDS + 10)
    assert world.settled()
    world.taken.clear()
    world.run_until_settled()
    assert world.specs() == {"w1": "old@gpu0", "w2": "old@gpu0"}


def test_up_can_be_run_again_after_a_refused_rollout() -> None:
    world = running(Version(slots=3, count=3))
    fail(world, FAILURES["cannot load"], slots=3, count=3)
    world.run_until_settled()
    world.fails = {}
    world.roll_out(Version("new", slots=3, count=3))
    world.run_until_settled()
    assert world.verdicts == ["given up", "promoted"]
    assert world.specs() == {f"w{n}": "new@gpu0" for n in (1, 2, 3)}
    assert world.memory.rollout.error == ""


def test_a_farm_on_which_nothing_runs_takes_up_a_candidate_that_works() -> None:
    """The configuration was wrong, and `up` with the right one repairs it."""
    world = World(Version(slots=2, count=2), fails={"old": 3})
    world.run_until_settled()
    assert world.states() == "failed stopped"
    world.roll_out(Version("new", slots=2, count=2))
    world.run_until_settled()
    assert world.verdicts == ["promoted"]
    assert len(world.ready()) == 2


def test_a_spare_slot_whose_spec_the_old_generation_had_too_ends_a_rollout_that_it_fails() -> None:
    world = running(Version(slots=2, count=1, devices=("gpu0", "gpu1")))
    world.fails = {"old@gpu1": 3}
    world.roll_out(Version("old", slots=2, count=1, devices=("gpu1",)))
    world.run_until_settled()
    assert world.verdicts == ["given up"]
    assert world.specs() == {"w1": "old@gpu0"}
    assert world.fewest_ready == 1
