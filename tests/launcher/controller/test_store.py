"""What the controller remembers beyond its own end: the same again, or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.config.sources import ConfigError
from launcher.config.state import StateDir, read_json
from launcher.controller.model import Desired, Memory, Record, Rollout
from launcher.controller.store import Store
from tests.launcher.controller.world import Version, World, running

DESIRED = Desired(3, frozenset({"w2", "w9"}))
MEMORY = Memory(
    records={
        "w1": Record(
            state="ready",
            pid=41,
            since=12.5,
            restarts=2,
            crashes=1,
            retry_at=3.0,
            proven=True,
            ready_seconds=4.25,
            spec="new",
            device="GPU-1",
            last_start=1_700_000_000.5,
        ),
        "w2": Record(state="failed", error="w2 could not load: é"),
        "w3": Record(waits_for="memory", waits_since=8.0, overdue=True),
    },
    rollout=Rollout((("w1", 41), ("w2", 0)), ("w3",), extra="w4", no_extra=True, error="why"),
    proven=frozenset({"new", "old"}),
    replaced={"crash": 2, "restart": 1},
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(StateDir(tmp_path / "state").create())


def test_nothing_is_remembered_of_a_new_farm(store: Store) -> None:
    assert store.read() == (Desired(), Memory())


@pytest.mark.parametrize("desired", [Desired(), DESIRED, Desired(0)])
@pytest.mark.parametrize("memory", [Memory(), MEMORY])
def test_what_is_written_is_read_again(store: Store, desired: Desired, memory: Memory) -> None:
    store.write(desired, memory)
    assert store.read() == (desired, memory)
    hash(store.read()[1].rollout)
    store.write(*store.read())
    assert store.read() == (desired, memory)


def test_a_controller_goes_on_with_a_rollout_from_its_file(store: Store) -> None:
    """It dies after every step."""

    class Mortal(World):
        def step(self) -> None:
            super().step()
            store.write(self.desired, self.memory)
            self.desired, self.memory = store.read()

    before = running(Version(slots=3, count=2))
    world = Mortal(**vars(before))
    world.drain("w1")
    world.roll_out(Version("new", slots=3, count=3))
    world.run_until_settled()
    assert world.verdicts == ["promoted"]
    assert world.specs() == {"w2": "new@gpu0", "w3": "new@gpu0"}


def test_a_file_of_up_without_a_memory_is_a_desired_state(store: Store) -> None:
    store.state.desired_file.write_text('{"count": 2, "drained": ["w1"]}')
    assert store.read() == (Desired(2, frozenset({"w1"})), Memory())
    store.state.desired_file.write_text('{"count": null, "drained": null}')
    assert store.read() == (Desired(), Memory())


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"count"', "\x00"])
def test_a_file_that_makes_no_sense_is_nothing(store: Store, text: str) -> None:
    store.state.desired_file.write_text(text)
    assert store.read() == (Desired(), Memory())
    store.write(DESIRED, MEMORY)
    assert store.read() == (DESIRED, MEMORY)


@pytest.mark.parametrize(
    ("key", "value", "desired"),
    [
        ("count", -1, Desired(None, DESIRED.drained)),
        ("count", True, Desired(None, DESIRED.drained)),
        ("count", "3", Desired(None, DESIRED.drained)),
        ("count", 2.5, Desired(None, DESIRED.drained)),
        ("drained", "w1", Desired(3)),
        ("drained", [1, "w2", None], Desired(3, frozenset({"w2"}))),
        ("drained", {"w1": 1}, Desired(3)),
    ],
)
def test_a_desired_state_that_makes_no_sense_is_dropped_and_the_rest_kept(
    store: Store, key: str, value: Any, desired: Desired
) -> None:
    store.write(DESIRED, MEMORY)
    data = read_json(store.state.desired_file)
    assert isinstance(data, dict)
    store.state.desired_file.write_text(json.dumps({**data, key: value}))
    assert store.read() == (desired, MEMORY)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("", None),
        ("", []),
        ("", "x"),
        ("records", None),
        ("records", ["w1"]),
        ("records/w1", None),
        ("records/w1/state", "asleep"),
        ("records/w1/state", None),
        ("records/w1/retry_at", "soon"),
        ("records/w1/pid", None),
        ("records/w1/crashes", []),
        ("records/w1/spec", 3),
        ("records/w1/waits_for", "godot"),
        ("rollout", None),
        ("rollout/pending", [["w1"]]),
        ("rollout/pending", [["w1", "x"]]),
        ("rollout/pending", 3),
        ("rollout/moving", [3]),
        ("rollout/moving", "w1"),
        ("rollout/extra", None),
        ("proven", "new"),
        ("proven", [3]),
        ("replaced", {"crash": "often"}),
    ],
)
def test_a_memory_that_makes_no_sense_is_forgotten_and_the_desired_state_kept(
    store: Store, path: str, value: Any
) -> None:
    """A wrong value that was believed would fail each round of the controller after it."""
    store.write(DESIRED, MEMORY)
    data = read_json(store.state.desired_file)
    assert isinstance(data, dict)
    *above, last = ["memory", *path.split("/")] if path else ["memory"]
    inner = data
    for key in above:
        inner = inner[key]
    inner[last] = value
    store.state.desired_file.write_text(json.dumps(data))
    assert store.read() == (DESIRED, Memory())


def test_a_folder_that_is_gone_is_an_error_of_one_line(store: Store) -> None:
    for folder in (store.state.logs, store.state.cache, store.state.generations):
        folder.rmdir()
    store.state.specs.rmdir()
    store.state.slots.rmdir()
    store.state.path.rmdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        store.write(DESIRED, MEMORY)
