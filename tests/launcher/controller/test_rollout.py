"""Rolling restarts and rollouts of a candidate, under a clock of our own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.controller.model import Memory
from tests.launcher.controller.world import STEP, Version, World, running

# Rolling restarts


def test_a_rolling_restart_starts_a_new_worker_first_where_a_slot_is_empty() -> None:
    world = running()
    pids = world.pids()
    world.restart()
    assert not world.settled()
    world.run(60)
    assert world.settled()
    assert world.fewest_ready == 2
    assert world.states() == "ready ready stopped stopped"
    assert world.started == ["w3", "w1", "w2"]
    assert all(world.alive[id_].pid != pid for id_, pid in pids.items())
    assert world.memory.replaced == {"restart": 2}
    assert world.memory.of("w1").restarts == 0


@pytest.mark.parametrize("count", [2, 3])
def test_a_rolling_restart_without_an_empty_slot_keeps_the_others(count: int) -> None:
    world = running(Version(slots=count, count=count))
    world.restart()
    world.run(100)
    assert world.settled()
    assert world.fewest_ready == count - 1
    assert len(world.started) == count


def test_the_only_worker_of_the_only_slot_is_drained_first() -> None:
    world = running(Version(slots=1, count=1))
    world.restart()
    world.run(20)
    assert world.settled()
    assert world.started == ["w1"]


def test_a_restart_into_something_that_cannot_load_leaves_the_old_workers() -> None:
    world = running()
    pids = world.pids()
    world.fails = {"w3": 1}
    world.restart()
    world.run(60)
    assert world.pids() == pids
    assert (
        "w3 ended 3 times before it was ready, last with exit code 1" in world.memory.rollout.error
    )
    assert world.settled()


def test_a_restart_is_given_up_where_no_other_worker_can_take_over() -> None:
    world = running(Version(slots=2, count=2))
    world.fails = {"w2": 1}
    world.memory = replace(world.memory, proven=frozenset())
    world.crash("w2")
    world.run(1)
    world.restart("w1")
    pid = world.pids()["w1"]
    world.memory = world.memory.with_record("w2", replace(world.memory.of("w2"), proven=False))
    world.run(100)
    assert world.pids()["w1"] == pid
    assert "the restart was given up: w2 ended" in world.memory.rollout.error
    assert world.settled()


def test_a_crash_during_a_rolling_restart_is_repaired_before_it_goes_on() -> None:
    world = running(Version(slots=3, count=3))
    world.restart()
    world.step()
    world.crash("w2")
    world.run(200)
    assert world.settled()
    assert world.states() == "ready ready ready"
    assert world.fewest_ready >= 1


def test_a_restart_where_memory_holds_no_extra_worker_drains_first() -> None:
    world = running(Version(slots=3, count=2), room={"gpu0": 2})
    pids = world.pids()
    world.restart()
    world.run_until_settled()
    assert world.started == ["w1", "w2"]
    assert world.fewest_ready == 1
    assert set(world.pids().values()).isdisjoint(pids.values())


def test_an_extra_worker_that_took_the_room_of_a_crashed_one_gives_it_back() -> None:
    world = running(Version(slots=3, count=2), room={"gpu0": 2})
    world.crash("w1")
    world.restart()
    world.run_until_settled()
    assert world.states() == "ready ready stopped"
    assert world.fewest_ready >= 1


# Rollouts that succeed


def test_a_candidate_that_loads_becomes_current_without_a_gap() -> None:
    world = running(Version(count=2))
    world.roll_out(Version("new", count=2))
    assert not world.settled()
    world.run_until_settled()
    assert world.verdicts == ["promoted"]
    assert world.current.name == "new"
    assert world.specs() == {"w1": "new@gpu0", "w2": "new@gpu0"}
    assert world.fewest_ready == 2
    assert world.memory.proven == {"new@gpu0"}, "what no plan has is forgotten"
    assert world.memory.replaced == {"restart": 2}


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_candidate_without_an_empty_slot_takes_the_slots_one_after_another(slots: int) -> None:
    world = running(Version(slots=slots, count=slots))
    world.roll_out(Version("new", slots=slots, count=slots))
    world.run_until_settled()
    assert world.verdicts == ["promoted"]
    assert set(world.specs().values()) == {"new@gpu0"}
    assert world.started == [f"w{n}" for n in range(1, slots + 1)]
    assert world.fewest_ready == slots - 1


def test_a_candidate_that_changes_no_worker_is_current_at_once() -> None:
    world = running(Version(count=2))
    pids = world.pids()
    world.roll_out(Version("old", count=3))
    world.run(STEP)
    assert world.verdicts == ["promoted"]
    world.run_until_settled()
    assert world.states() == "ready ready ready stopped"
    assert pids.items() <= world.pids().items()


@pytest.mark.parametrize("name", ["old", "new"])
def test_a_plan_that_shrinks_drains_the_surplus_and_goes_on(name: str) -> None:
    world = running(Version(slots=8, count=8))
    world.roll_out(Version(name, slots=3, count=3))
    world.run_until_settled()
    assert world.verdicts == ["promoted"]
    assert world.specs() == {f"w{n}": f"{name}@gpu0" for n in (1, 2, 3)}
    assert set(world.memory.records) == {"w1", "w2", "w3"}
    assert world.fewest_ready >= 3
    assert world.memory.replaced.get("crash", 0) == 0
    world.crash("w2")
    world.run(10)
    assert world.states() == "ready ready ready", "crashed workers are still replaced"


def test_a_plan_that_shrinks_below_what_serves_keeps_that_until_another_is_ready() -> None:
    world = running(Version(slots=4, count=4))
    for id_ in ("w1", "w2", "w3"):
        world.crash(id_)
    world.roll_out(Version("old", slots=2, count=2))
    world.run_until_settled()
    assert world.specs() == {"w1": "old@gpu0", "w2": "old@gpu0"}
    assert world.fewest_ready >= 1


def test_a_plan_that_shrinks_while_slots_are_drained_and_scaled_settles() -> None:
    world = running(Version(slots=8, count=8))
    world.drain("w2", "w7")
    world.run_until_settled()
    world.scale(5)
    world.roll_out(Version("new", slots=4, count=4))
    world.run_until_settled()
    assert world.desired.drained == {"w2", "w7"}, "w7 may come back with a later plan"
    assert set(world.specs()) == {"w1", "w3", "w4"}


def test_a_candidate_with_more_slots_fills_them_before_it_replaces_the_old_ones() -> None:
    world = running(Version(slots=2, count=2))
    world.roll_out(Version("new", slots=4, count=4))
    world.run_until_settled()
    assert world.verdicts == ["promoted"]
    assert world.started == ["w3", "w4", "w1", "w2"]
    assert set(world.specs().values()) == {"new@gpu0"}
    assert world.fewest_ready == 2


def test_other_devices_for_the_same_slots_replace_the_workers_one_after_another() -> None:
    world = running(Version(slots=3, count=3, devices=("gpu0",)))
    world.roll_out(Version("old", slots=3, count=3, devices=("gpu1",)))
    world.run_until_settled()
    assert world.verdicts == ["promoted"]
    assert world.specs() == {f"w{n}": "old@gpu1" for n in (1, 2, 3)}
    assert {record.device for record in world.memory.records.values()} == {"gpu1"}
    assert world.fewest_ready == 2
    assert world.drains() == ["w1", "w2", "w3"]


def test_only_the_workers_whose_device_changes_are_replaced() -> None:
    world = running(Version(slots=4, count=4, devices=("gpu0", "gpu1")))
    pids = world.pids()
    world.roll_out(Version("old", slots=4, count=4, devices=("gpu0", "gpu2")))
    world.run_until_settled()
    kept = {id_ for id_, pid in world.pids().items() if pids[id_] == pid}
    assert kept == {"w1", "w3"}


def test_a_candidate_that_fits_beside_no_old_worker_gets_room_from_them() -> None:
    world = running(Version(slots=4, count=4), room={"gpu0": 4})
    world.roll_out(Version("new", slots=2, count=2, need=2))
    world.run_until_settled()
    assert world.verdicts == ["promoted"]
    assert world.specs() == {"w1": "new@gpu0", "w2": "new@gpu0"}
    assert world.fewest_ready >= 1


def test_the_last_old_worker_goes_only_where_no_other_way_is_left() -> None:
    world = running(Version(slots=2, count=2), room={"gpu0": 2})
    world.roll_out(Version("new", slots=1, count=1, need=2))
    world.run_until_settled()
    assert world.verdicts == ["promoted"]
    assert world.specs() == {"w1": "new@gpu0"}


def test_room_is_made_on_the_device_that_lacks_it_and_nowhere_else() -> None:
    """Another tenant has taken what the first worker left on gpu1."""
    world = running(Version(slots=6, count=6, devices=("gpu1", "gpu0")), room={"gpu1": 3})
    world.roll_out(Version("new", slots=6, count=6, devices=("gpu1", "gpu0")))
    world.step()
    world.room = {"gpu1": 2}
    world.run(25)
    assert world.fewest_ready >= 4
    world.room = {"gpu1": 3}
    world.run_until_settled()
    assert world.fewest_ready >= 4
    assert len(world.ready()) == 6


def test_a_new_candidate_supersedes_one_that_is_under_way() -> None:
    world = running(Version(slots=3, count=3))
    world.roll_out(Version("new", slots=3, count=3))
    world.run(12)
    assert set(world.specs().values()) == {"old@gpu0", "new@gpu0"}
    world.roll_out(Version("newer", slots=3, count=3))
    world.run_until_settled()
    assert world.specs() == {f"w{n}": "newer@gpu0" for n in (1, 2, 3)}
    assert world.verdicts == ["promoted"]


def test_going_back_to_the_current_one_while_another_is_rolled_out() -> None:
    world = running(Version(slots=3, count=3))
    world.roll_out(Version("new", slots=3, count=3))
    world.run(12)
    world.roll_out(Version("old", slots=3, count=3))
    world.run_until_settled()
    assert world.specs() == {f"w{n}": "old@gpu0" for n in (1, 2, 3)}
    assert world.fewest_ready == 2


def test_a_worker_that_was_just_being_started_as_a_candidate_came_is_replaced_too() -> None:
    world = World(Version(slots=2, count=2))
    world.step()  # decided, and not observed yet
    world.roll_out(Version("new", slots=2, count=2))
    world.run_until_settled()
    assert world.verdicts == ["promoted"]
    assert world.specs() == {"w1": "new@gpu0", "w2": "new@gpu0"}


def test_a_rollout_goes_on_when_the_controllers_memory_is_lost() -> None:
    world = running(Version(slots=3, count=3))
    world.roll_out(Version("new", slots=3, count=3))
    world.run(12)
    world.memory = Memory()
    world.run_until_settled()
    assert world.verdicts == ["promoted"]
    assert world.specs() == {f"w{n}": "new@gpu0" for n in (1, 2, 3)}
    assert world.fewest_ready >= 1


def test_crashes_of_the_old_spec_are_not_held_against_the_new_one() -> None:
    world = running(Version(slots=2, count=2))
    for _ in range(5):
        world.crash("w1")
        world.run(12)
    world.crash("w1")
    world.roll_out(Version("new", slots=2, count=2))
    world.run_until_settled()
    assert world.verdicts == ["promoted"]


def test_scaling_while_a_candidate_is_rolled_out() -> None:
    world = running(Version(slots=4, count=3))
    world.roll_out(Version("new", slots=4, count=3))
    world.run(7)
    world.scale(1)
    world.run(10)
    world.scale(4)
    world.run_until_settled()
    assert world.specs() == {f"w{n}": "new@gpu0" for n in (1, 2, 3, 4)}
    assert world.fewest_ready >= 1
