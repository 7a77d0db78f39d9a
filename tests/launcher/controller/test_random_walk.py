"""Random walks: whatever happens, and whatever gets lost, the farm comes to rest as desired."""

from __future__ import annotations

import random

import pytest

from launcher.controller.model import BLOCKED_SECONDS, Memory
from launcher.controller.reconcile import MAX_BACKOFF
from tests.launcher.controller.world import LOAD_TIMEOUT, Version, World

EVENTS = (
    *("crash", "crash", "scale", "restart", "drain", "refill", "roll out", "roll out"),
    *("lose", "break", "memory", "port", "wait", "wait"),
)


def version(chance: random.Random, world: World) -> Version:
    """Another version, or the same one with another plan."""
    slots = chance.randint(1, 6)
    names = [world.current.name, "a", "b", "c"]
    devices = chance.choice([("gpu0",), ("gpu1",), ("gpu0", "gpu1")])
    return Version(
        chance.choice(names),
        slots=slots,
        count=chance.randint(0, slots),
        devices=devices,
        load_seconds=chance.choice([0.0, 2.0, 7.0]),
        need=1,
    )


def happen(event: str, world: World, chance: random.Random) -> None:
    alive, ids = sorted(world.alive), sorted(world.goal.by_id)
    if event == "crash" and alive:
        world.crash(chance.choice(alive), chance.choice([-9, 0, 1, 3]))
    elif event == "scale":
        world.scale(chance.choice([None, chance.randint(0, world.current.slots)]))
    elif event == "restart":
        world.restart(*chance.choice([(), (chance.choice(ids),)]))
    elif event == "drain":
        world.drain(chance.choice(ids))
    elif event == "refill":
        world.restart(*world.goal.drained)
    elif event == "roll out":
        world.roll_out(version(chance, world))
    elif event == "lose":
        world.lost = chance.choice([0.0, 0.3, 0.9])
    elif event == "break":
        keys = ["a", "b", "c", "w1", "w2", "a@gpu1"]
        world.fails = {chance.choice(keys): chance.choice([1, 3])} if chance.random() < 0.6 else {}
    elif event == "memory":
        units = chance.choice([1, 2, 4, 6, 12])
        world.room = {"gpu0": units, "gpu1": chance.choice([0, units])}
    elif event == "port":
        world.taken = {chance.choice(ids): "pid 42"} if not world.taken else {}


@pytest.mark.parametrize("seed", [*range(60), 1021, 1458])
def test_whatever_happens_it_comes_to_rest_as_desired_when_the_world_calms_down(seed: int) -> None:
    chance = random.Random(seed)
    slots = chance.choice([1, 2, 4, 5])
    world = World(
        Version("a", slots=slots, count=min(2, slots), load_seconds=chance.choice([0.0, 2.0, 7.0])),
        chance=random.Random(seed + 1),
    )
    for _ in range(30):
        happen(chance.choice(EVENTS), world, chance)
        world.run(chance.choice([0.5, 2, 10, 40]))
    calm(world)
    world.scale(None)  # asked again: what has failed for good is tried again
    world.run_until_settled()
    assert set(world.ready()) == set(world.goal.desired_slots), world.memory
    assert all(process.spec == world.goal.target(id_).spec for id_, process in world.alive.items())
    assert {id_ for id_, record in world.memory.records.items() if record.alive} == set(world.alive)
    assert set(world.memory.records) <= set(world.goal.by_id), "no record of a slot that is gone"
    world.run(60)
    actions = len(world.sent)
    world.run(60)
    assert len(world.sent) == actions, "at rest nothing is done"


def calm(world: World) -> None:
    """Nothing is broken, lost or short any more; what is under way comes to its end."""
    world.lost, world.fails, world.room, world.taken = 0.0, {}, {}, {}
    world.run(3 * LOAD_TIMEOUT + MAX_BACKOFF + BLOCKED_SECONDS)
    assert world.candidate is None, "each rollout comes to an end"


@pytest.mark.parametrize("seed", range(40))
def test_a_rollout_never_leaves_fewer_ready_than_one_where_two_or_more_serve(seed: int) -> None:
    """Whether the candidate is good or bad, with crashes of one worker at a time and lost
    actions."""
    chance = random.Random(seed)
    slots = chance.randint(2, 6)
    count = chance.randint(2, slots)
    world = World(Version("old", slots=slots, count=count), chance=random.Random(seed + 1))
    world.run_until_settled()
    world.fewest_ready = 99
    world.lost = chance.choice([0.0, 0.3])
    new = Version("new", slots=chance.randint(2, 6), count=2, need=chance.choice([1, 1, 2]))
    world.room = chance.choice([{}, {"gpu0": max(count, 2 * new.need)}])
    world.fails = chance.choice([{}, {"new": 1}, {"new": 3}])
    world.roll_out(new)
    while world.candidate is not None or not world.settled():
        assert world.now < 2000, world.memory
        if chance.random() < 0.02 and len(world.ready()) > 2:
            world.crash(chance.choice(world.ready()))
        world.run(0.5)
    assert world.fewest_ready >= 1
    assert world.verdicts == ["given up" if world.fails else "promoted"]
    assert len(world.ready()) == len(world.goal.desired_slots)


@pytest.mark.parametrize("seed", range(20))
def test_a_controller_that_forgets_everything_converges_too(seed: int) -> None:
    chance = random.Random(seed)
    world = World(Version("a", slots=4, count=3))
    for _ in range(10):
        happen(chance.choice(["crash", "roll out", "restart", "scale"]), world, chance)
        world.run(chance.choice([0.5, 3, 10]))
        if chance.random() < 0.3:
            world.memory = Memory()
    calm(world)
    world.run_until_settled()
    assert set(world.ready()) == set(world.goal.desired_slots)
