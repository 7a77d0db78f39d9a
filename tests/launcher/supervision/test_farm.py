"""A farm on disk: generations that are written, kept, dropped, and understood or not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.config.settings import Settings
from launcher.config.settings import load as load_settings
from launcher.config.state import StateDir
from launcher.planning.inventory import Device, Footprint, Host
from launcher.planning.plan import Limits, Plan, plan
from launcher.supervision import farm as farms
from launcher.supervision.farm import Farm, Generation
from tests.launcher.supervision.farm_records import farm_of, generation_of

GIB = 2**30
CARDS = [
    Device(id=f"GPU-{n}", name="A card", kind="gpu", total=24 * GIB, free=24 * GIB) for n in (1, 2)
]


def settings(tmp_path: Path, **changes: Any) -> Settings:
    file = tmp_path / "gpufarm.toml"
    file.touch()
    given = {"state_dir": str(tmp_path / "state"), "model.target": "hello:Hello"}
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    return load_settings(file, given | dotted, {"HOME": str(tmp_path)})


def planned(cards: list[Device] = CARDS, count: int = 4) -> Plan:
    return plan(cards, Footprint.given(5 * GIB), Host(), Limits(count=count, max=count))


@pytest.fixture
def farm(tmp_path: Path) -> Farm:
    (tmp_path / "hello.py").write_text("class Hello: ...")
    made = farm_of(settings(tmp_path), planned())
    made.state.create().record_ports(made.ports)
    return made


def record(farm: Farm) -> Farm:
    """Write everything down as `up` and the controller do."""
    for generation in farm.generations:
        farms.save_generation(farm.state, generation)
    farms.save(farm)
    return farm


def numbers(state: StateDir) -> list[str]:
    return sorted(path.name for path in state.generations.iterdir())


def next_one(farm: Farm, **changes: Any) -> Generation:
    return replace(farm.current, number=farm.current.number + 1, **changes)


def test_a_farm_is_read_back_as_it_was_written(farm: Farm) -> None:
    assert farms.load(farm.state) is None
    record(farm)
    assert farms.load(farm.state) == farm
    pending = record(replace(farm, candidate=next_one(farm, sources="other"), failure="it broke"))
    assert farms.load(farm.state) == pending
    assert pending.generations == (pending.current, pending.candidate)


def test_a_promoted_candidate_is_current_and_what_was_before_is_removed(farm: Farm) -> None:
    pending = record(replace(farm, candidate=next_one(farm, sources="b"), failure="an older one"))
    assert numbers(farm.state) == ["1.json", "2.json"]
    promoted = pending.promoted()
    farms.save(promoted)
    assert numbers(farm.state) == ["2.json"]
    assert farms.load(farm.state) == promoted
    assert (promoted.current.number, promoted.candidate, promoted.failure) == (2, None, "")


def test_an_abandoned_candidate_leaves_the_current_one_and_why(farm: Farm) -> None:
    pending = record(replace(farm, candidate=next_one(farm, sources="b")))
    abandoned = pending.abandoned("w1 could not load")
    farms.save(abandoned)
    assert farms.load(farm.state) == abandoned
    assert abandoned.current == farm.current
    assert abandoned.failure == "w1 could not load"


def test_a_generation_that_is_just_being_written_is_not_removed(farm: Farm) -> None:
    """`up` writes the next one before the controller hears of it."""
    record(farm)
    farms.save_generation(farm.state, next_one(farm))
    farms.save(farm)
    assert numbers(farm.state) == ["1.json", "2.json"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("farm.json", "{half"),
        ("farm.json", "[]"),
        ("farm.json", '{"current": null, "candidate": null, "failure": ""}'),
        ("farm.json", '{"current": 7, "candidate": null, "failure": ""}'),
        ("farm.json", '{"current": 1}'),
        ("generations/1.json", "\x00\x01"),
        ("generations/1.json", "null"),
        ("generations/1.json", "{}"),
        ("generations/1.json", '{"settings": {}, "plan": {}, "sources": ""}'),
        ("generations/1.json", '{"settings": [], "plan": 3, "sources": null}'),
    ],
)
def test_records_that_make_no_sense_are_no_farm(farm: Farm, file: str, content: str) -> None:
    record(farm)
    (farm.state.path / file).write_text(content)
    assert farms.load(farm.state) is None


def test_a_settings_file_of_another_version_is_no_farm(farm: Farm) -> None:
    record(farm)
    path = farm.state.generations / "1.json"
    data = json.loads(path.read_text())
    data["settings"]["workers"]["was_removed"] = 1
    path.write_text(json.dumps(data))
    assert farms.load(farm.state) is None


def test_a_lost_candidate_leaves_the_farm_with_the_current_one(farm: Farm) -> None:
    record(replace(farm, candidate=next_one(farm)))
    (farm.state.generations / "2.json").unlink()
    assert farms.load(farm.state) == replace(farm, failure=farms.LOST_CANDIDATE)


def specs(generation: Generation) -> list[str]:
    return [generation.spec_of(slot) for slot in generation.plan.slots]


def test_a_spec_belongs_to_the_device_of_its_slot(farm: Farm) -> None:
    first, second, third, fourth = specs(farm.current)
    assert first == third != second == fourth


def test_a_spec_changes_with_what_the_worker_is_started_with(farm: Farm, tmp_path: Path) -> None:
    before = specs(farm.current)
    for same in (
        generation_of(settings(tmp_path), planned(), number=9),
        generation_of(settings(tmp_path, port=9000), planned()),
        generation_of(settings(tmp_path), planned().with_ports([1, 2, 3, 4])),
        generation_of(settings(tmp_path, workers__max=4, logs__backups=2), planned()),
    ):
        assert specs(same) == before
    moved = generation_of(settings(tmp_path), planned(CARDS[1:]))
    assert specs(moved) == [before[1]] * 4, "only w1 and w3 are on another device"
    changed = generation_of(settings(tmp_path, model__args={"size": 2}), planned())
    assert set(specs(changed)).isdisjoint(before)
    (tmp_path / "hello.py").write_text("class Hello:\n    size = 2")
    edited = generation_of(settings(tmp_path), planned())
    assert set(specs(edited)).isdisjoint(before)


def test_generations_are_the_same_but_for_their_number(farm: Farm, tmp_path: Path) -> None:
    assert next_one(farm).same_as(farm.current)
    assert not next_one(farm, sources="other").same_as(farm.current)
    assert not next_one(farm, settings=settings(tmp_path, port=9000)).same_as(farm.current)


def written(farm: Farm, generation: Generation | None = None) -> dict[str, tuple[int, str]]:
    """Every file of the slots and what they name, after their launches were written."""
    for slot in (generation or farm.current).plan.slots:
        farms.write_launch(farm, generation or farm.current, slot)
    folders = (farm.state.slots, farm.state.specs)
    files = [path for folder in folders for path in folder.iterdir()]
    return {path.name: (path.stat().st_ino, path.read_text()) for path in files}


def test_a_launch_is_written_only_where_it_changes(farm: Farm) -> None:
    before = written(farm)
    assert len(before) == 4 + 1, "four slots and the spec that they share"
    assert written(farm) == before, "not even replaced by the same: a full disk stops nothing"
    state = farm.state
    state.slots.chmod(0o500)
    assert written(farm) == before
    state.slots.chmod(0o700)


def test_a_launch_names_its_spec_its_port_and_its_device(farm: Farm) -> None:
    files = {name: json.loads(text) for name, (_, text) in written(farm).items()}
    launched = [files[f"w{n}.json"] for n in (1, 2, 3, 4)]
    devices = [launch["environment"]["CUDA_VISIBLE_DEVICES"] for launch in launched]
    assert devices == ["GPU-1", "GPU-2", "GPU-1", "GPU-2"]
    ports = [int(launch["argv"][launch["argv"].index("--port") + 1]) for launch in launched]
    assert tuple(ports) == farm.ports
    spec = Path(launched[0]["argv"][launched[0]["argv"].index("--spec") + 1])
    assert spec.parent == farm.state.specs
    assert files[spec.name]["model"]["target"] == "hello:Hello"


def test_another_generation_has_another_spec_file_beside_the_old_one(
    farm: Farm, tmp_path: Path
) -> None:
    """A worker of the current one that crashes meanwhile starts as it was."""
    before = written(farm)
    candidate = generation_of(settings(tmp_path, model__args={"size": 2}), planned(), number=2)
    after = written(replace(farm, candidate=candidate), candidate)
    spec = next(name for name in before if not name.startswith("w"))
    assert after[spec] == before[spec]
    assert len(after) == len(before) + 1
    assert {**written(farm), spec: before[spec]}.keys() == after.keys()


def test_the_ports_of_a_shrunken_plan_stay_with_the_farm(farm: Farm) -> None:
    shrunk = replace(farm, current=next_one(farm, plan=planned(count=2)))
    assert shrunk.port_of("w4") == farm.ports[3]
    with pytest.raises(IndexError):
        shrunk.port_of("w5")
