"""Decisions about single workers under a clock of our own: starts, crashes, drains, waits."""

from __future__ import annotations

from itertools import pairwise

import pytest

from launcher.controller.model import (
    BLOCKED_SECONDS,
    MAX_EARLY_CRASHES,
    Desired,
    Goal,
    Memory,
    Record,
    Target,
)
from launcher.controller.reconcile import CALM_SECONDS, FIRST_BACKOFF, MAX_BACKOFF, backoff
from tests.launcher.controller.world import LOAD_TIMEOUT, SILENCE, STEP, Version, World, running


def test_workers_start_one_at_a_time_each_behind_the_one_before() -> None:
    world = World(Version(count=3))
    world.step()
    assert world.states() == "starting stopped stopped stopped"
    world.run(5)
    assert world.started == ["w1"]
    world.run(11)
    assert world.states() == "ready ready ready stopped"
    assert world.memory.of("w3").ready_seconds == pytest.approx(5, abs=STEP)
    assert world.settled()


def test_a_record_tells_what_its_worker_was_started_with_and_where() -> None:
    world = running(Version(count=2, devices=("gpu0", "gpu1")))
    assert (world.memory.of("w2").spec, world.memory.of("w2").device) == ("old@gpu1", "gpu1")
    assert world.memory.proven == {"old@gpu0", "old@gpu1"}


def test_scale_up_and_down() -> None:
    world = running(Version(count=1))
    world.scale(3)
    assert not world.settled()
    world.run(20)
    assert world.states() == "ready ready ready stopped"
    world.scale(1)
    world.step()
    assert world.states() == "ready draining draining stopped", "the highest go, together"
    world.run(5)
    assert world.states() == "ready stopped stopped stopped"
    assert world.memory.of("w3").restarts == 0
    assert world.settled()


def test_scale_auto_goes_back_to_the_count_of_the_plan() -> None:
    world = running(Version(count=2))
    world.scale(0)
    world.run(5)
    assert world.alive == {}
    assert world.settled()
    world.scale(None)
    world.run(20)
    assert world.states() == "ready ready stopped stopped"


def test_scale_down_never_ends_the_only_worker_that_serves() -> None:
    world = running(Version(count=2))
    world.crash("w1")
    world.scale(1)
    world.run(3)
    assert world.states() == "starting ready stopped stopped"
    world.run(10)
    assert world.states() == "ready stopped stopped stopped"


def test_a_worker_that_hangs_is_killed_and_replaced() -> None:
    world = running()
    world.frozen["w1"] = world.now
    world.run(SILENCE)
    assert world.states().startswith("ready ready"), "busy is not hanging"
    world.run(2 * STEP)
    assert world.kills() == ["w1"]
    assert "w1 did not answer for 20 s" in world.memory.of("w1").error
    del world.frozen["w1"]
    world.run(world.current.load_seconds + 2)
    assert world.states().startswith("ready ready")
    assert world.memory.of("w1").restarts == 1
    assert world.memory.of("w1").error == ""


def test_a_crashed_worker_is_back_within_its_load_time_and_two_seconds() -> None:
    world = running()
    world.crash("w2")
    world.run(STEP)
    world.run(world.current.load_seconds + 1)
    assert world.states().startswith("ready ready")
    assert world.memory.of("w2").restarts == 1
    assert world.memory.replaced == {"crash": 1}
    assert world.memory.of("w2").error == ""


def test_a_replacement_waits_until_its_memory_has_returned() -> None:
    world = running()
    world.unclear.add("w2")
    world.crash("w2")
    world.run(20)
    assert world.states() == "ready stopped stopped stopped"
    assert "ended by a signal" in world.memory.of("w2").error
    world.unclear.clear()
    world.run(7)
    assert world.states() == "ready ready stopped stopped"


def test_backoff_doubles_to_its_limit_and_is_reset_after_calm() -> None:
    assert [backoff(n, early=False) for n in (1, 2, 3)] == [0.1, 0.2, 0.4]
    assert backoff(20, early=False) == MAX_BACKOFF
    world = running(Version(count=1, load_seconds=0.0))
    for crashes in range(1, 6):
        world.crash("w1", 1)
        world.run(5)
        assert world.memory.of("w1").crashes == crashes
    assert world.memory.of("w1").restarts == 5
    world.run(CALM_SECONDS + 1)
    assert world.memory.of("w1").crashes == 0


def test_a_worker_that_cannot_load_fails_once_and_takes_no_other_with_it() -> None:
    world = World(Version(count=3), fails={"w1": 3})
    world.run(60)
    assert world.started == ["w1"]
    assert world.states() == "failed stopped stopped stopped"
    assert world.memory.of("w1").error == "w1 could not load: no such file"
    assert world.settled(), "there is nothing to wait for"


def test_a_device_on_which_nothing_loads_does_not_hold_up_the_others() -> None:
    world = World(Version(count=4, devices=("gpu0", "gpu1")), fails={"w1": 3, "w3": 3})
    world.run(60)
    assert world.states() == "failed ready stopped ready"
    assert world.started == ["w1", "w2", "w4"]


@pytest.mark.parametrize("everywhere", [True, False])
def test_cannot_load_after_the_spec_was_ready_once_is_a_crash_like_others(
    everywhere: bool,
) -> None:
    """A network file system that is away for a minute must not end a farm that has served."""
    world = running(Version(count=3))
    world.fails = {"old": 3} if everywhere else {"w1": 3}
    for id_ in list(world.alive):
        world.crash(id_)
    world.run(100)
    assert "failed" not in world.states()
    assert "w1 ended with exit code 3: no such file" in world.memory.of("w1").error
    assert ("ready" in world.states()) is not everywhere
    world.fails = {}
    world.run_until_settled()
    assert world.states() == "ready ready ready stopped"


def test_a_new_slot_that_cannot_load_what_others_have_loaded_is_tried_again() -> None:
    world = running(Version(count=1))
    world.fails = {"w2": 3}
    world.scale(2)
    world.run(60)
    assert world.started.count("w2") > 1
    assert world.state("w2") != "failed"
    world.fails = {}
    world.run(MAX_BACKOFF + 10)
    assert world.states() == "ready ready stopped stopped"


def test_a_worker_that_crashes_while_loading_is_reported_and_tried_with_growing_pauses() -> None:
    world = World(Version(count=1), fails={"w1": 1})
    starts: list[float] = []
    while len(starts) < 12:
        before = len(world.started)
        world.run(STEP)
        if len(world.started) > before:
            starts.append(world.now)
        gave_up = world.memory.of("w1").crashes >= MAX_EARLY_CRASHES
        assert world.memory.of("w1").gave_up is world.settled() is gave_up
    pauses = [b - a for a, b in pairwise(starts)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(MAX_BACKOFF + world.current.load_seconds, abs=3 * STEP)
    assert "times before it was ready, last with exit code 1" in world.memory.of("w1").error
    world.fails = {}
    world.run(MAX_BACKOFF + 10)
    assert world.states().startswith("ready"), "what was in the way has gone"
    assert (world.memory.of("w1").error, world.memory.of("w1").gave_up) == ("", False)


def test_a_user_who_asks_again_need_not_wait_for_the_pause() -> None:
    world = World(Version(count=1), fails={"w1": 1})
    world.run(200)
    assert world.memory.of("w1").gave_up
    world.fails = {}
    world.scale(1)
    world.run(7)
    assert world.states().startswith("ready")


def test_others_of_the_same_spec_wait_for_one_that_crashes_while_loading() -> None:
    world = World(Version(count=3), fails={"old": 1})
    world.run(200)
    assert set(world.started) == {"w1"}
    assert world.settled()


def test_a_worker_that_has_loaded_before_is_tried_for_ever() -> None:
    world = running(Version(count=1))
    world.fails = {"w1": 1}
    world.crash("w1")
    world.run(600)
    assert len(world.started) > MAX_EARLY_CRASHES + 3
    assert not world.memory.of("w1").gave_up
    world.fails = {}
    world.run(60)
    assert world.states().startswith("ready")


def test_a_load_that_takes_too_long_is_killed_reported_and_tried_again() -> None:
    world = World(Version(count=1, load_seconds=1e9))
    world.run(LOAD_TIMEOUT - 1)
    assert world.states().startswith("starting")
    assert not world.settled()
    world.run(5)
    assert world.kills() == ["w1"]
    assert world.memory.of("w1").error == "w1 was not ready within 60 s"
    assert world.memory.of("w1").gave_up, "another try takes as long again"
    assert world.settled()
    world.run(LOAD_TIMEOUT + MAX_BACKOFF)
    assert len(world.started) > 1


@pytest.mark.parametrize("what", ["port", "room"])
def test_a_start_that_is_blocked_waits_is_reported_and_is_made_when_the_way_is_free(
    what: str,
) -> None:
    world = World(Version(count=2), room={"gpu0": 2})
    if what == "port":
        world.taken["w1"] = "pid 42 (python)"
    else:
        world.room = {"gpu0": 1}
    id_ = "w1" if what == "port" else "w2"
    words = "its port is taken by pid 42 (python)" if what == "port" else "it needs 1, and 0 are"
    world.run(15)
    assert world.started == ["w2" if what == "port" else "w1"], "the other one serves"
    assert f"{id_} cannot start: {words}" in world.memory.of(id_).error
    assert not world.settled(), "it may clear in a moment"
    world.run(BLOCKED_SECONDS)
    assert world.settled()
    assert (world.memory.of(id_).crashes, world.memory.of(id_).restarts) == (0, 0)
    world.taken.clear()
    world.room = {"gpu0": 2}
    world.run(8)
    assert world.states() == "ready ready stopped stopped"
    assert world.memory.of(id_).error == ""


def test_a_drained_worker_comes_back_only_after_its_slot_was_examined() -> None:
    """The port or the memory may have gone to another while it drained."""
    world = running(Version(slots=2, count=2), room={"gpu0": 2})
    world.restart("w1")
    world.step()
    world.room = {"gpu0": 1}  # another tenant takes what it leaves
    world.run(BLOCKED_SECONDS / 2)
    assert world.started == []
    assert "w1 cannot start: it needs 1, and 0 are free" in world.memory.of("w1").error
    world.room = {"gpu0": 2}
    world.run_until_settled()
    assert world.states() == "ready ready"


def test_a_drained_slot_stays_empty_and_the_next_takes_over_when_asked() -> None:
    world = running(Version(count=3))
    world.drain("w2")
    world.run(20)
    assert world.states() == "ready stopped ready stopped"
    world.scale(3)
    world.run(20)
    assert world.states() == "ready stopped ready ready"
    assert world.goal.desired_slots == ("w1", "w3", "w4")
    world.restart("w2")
    world.run_until_settled()
    assert world.states() == "ready ready ready ready", "four slots are in use with w2"


def test_a_busy_server_that_no_longer_answers_is_left_alone() -> None:
    world = running(Version(count=1))
    process = world.alive["w1"]
    process.ready_at = world.now + 1e6
    process.asked_to_end = True  # as far as the world's own check is concerned
    world.run(500)
    assert world.states().startswith("ready")
    assert world.sent == []


def test_a_new_controller_takes_over_what_runs() -> None:
    world = running()
    pids = world.pids()
    remembered = world.memory
    world.memory = Memory()  # even without any memory
    world.run(10)
    assert world.states() == "ready ready stopped stopped"
    world.memory = remembered
    world.run(10)
    assert world.pids() == pids
    assert world.started == []


def test_a_worker_that_an_operator_ended_comes_back() -> None:
    world = running()
    world.crash("w1", exit_code=0)
    world.run(8)
    assert world.states() == "ready ready stopped stopped"
    assert world.memory.of("w1").restarts == 1


def test_a_worker_that_an_operator_stops_through_supervisord_drains_and_comes_back() -> None:
    world = running()
    world.alive["w1"].asked_to_end = True
    world.alive["w1"].ends_at = world.now + 2
    world.run(1)
    assert world.state("w1") == "draining"
    world.run(10)
    assert world.states() == "ready ready stopped stopped"
    assert (world.memory.of("w1").restarts, world.memory.of("w1").error) == (0, "")


# Actions that get lost are decided again.


def lose_next(world: World, seconds: float) -> None:
    world.lost = 1.0
    world.run(seconds)
    world.lost = 0.0


def test_a_start_that_did_not_happen_is_sent_again_and_is_no_crash() -> None:
    world = World(Version(count=2))
    lose_next(world, 5)
    assert world.started == []
    assert {action.id for action in world.sent} == {"w1"}, "one at a time, also in vain"
    world.run_until_settled()
    assert world.states() == "ready ready stopped stopped"
    record = world.memory.of("w1")
    assert (record.crashes, record.restarts, world.memory.replaced) == (0, 0, {})


def test_a_start_whose_worker_ended_at_once_is_a_crash() -> None:
    """Between two looks it came and went: supervisord's time of the start tells."""
    world = World(Version(count=1, load_seconds=0.0), fails={"w1": 1})
    world.run(2 * STEP)
    assert world.memory.of("w1").crashes == 1


def test_a_drain_that_did_not_happen_is_sent_until_it_is_seen() -> None:
    world = running()
    world.scale(1)
    lose_next(world, 5)
    assert world.state("w2") == "draining"
    assert len(world.drains()) > 3
    assert not world.settled()
    sent = len(world.sent)
    world.run(5)
    assert world.states() == "ready stopped stopped stopped"
    assert len(world.sent) == sent + 1
    assert world.settled()


def test_a_lost_kill_holds_nothing_up_for_ever() -> None:
    world = World(Version(count=2), fails={})
    world.step()
    world.alive["w1"].ready_at = 1e9
    world.run(LOAD_TIMEOUT - 1)
    lose_next(world, 10)
    assert world.state("w1") == "starting"
    world.run(60)
    assert world.states() == "ready ready stopped stopped"


def test_a_start_that_never_happened_and_is_not_wanted_any_more_leaves_nothing() -> None:
    world = World(Version(count=1))
    lose_next(world, 2)
    world.scale(0)
    world.run_until_settled()
    assert world.alive == {}


# Goals


def targets(*ids: str) -> tuple[Target, ...]:
    return tuple(Target(id_, "cpu", "spec") for id_ in ids)


@pytest.mark.parametrize(
    ("planned", "desired", "desired_slots"),
    [
        (2, Desired(), ("w1", "w2")),
        (2, Desired(3), ("w1", "w2", "w3")),
        (2, Desired(0), ()),
        (2, Desired(9), ("w1", "w2", "w3")),
        (2, Desired(drained=frozenset({"w1"})), ("w2",)),
        (3, Desired(2, frozenset({"w1"})), ("w2",)),
        (3, Desired(9, frozenset({"w2"})), ("w1", "w3")),
        (2, Desired(drained=frozenset({"w9"})), ("w1", "w2")),
        (0, Desired(drained=frozenset({"w1"})), ()),
    ],
)
def test_a_goal_is_the_plan_or_the_scaled_count_less_what_is_drained(
    planned: int, desired: Desired, desired_slots: tuple[str, ...]
) -> None:
    goal = Goal.of(targets("w1", "w2", "w3"), planned, desired)
    assert goal.desired_slots == desired_slots
    assert goal.drained <= set(goal.by_id)


def test_an_unknown_slot_has_an_empty_record() -> None:
    assert Memory().of("w9") == Record()
    assert not Record().alive
    assert FIRST_BACKOFF < MAX_BACKOFF
