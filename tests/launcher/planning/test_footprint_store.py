"""Footprints are remembered under everything that could change them, and under nothing else."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.config.settings import Settings, load
from launcher.config.sizes import GIB
from launcher.config.state import StateDir
from launcher.planning import footprint_store
from launcher.planning.footprint_store import FootprintStore, key_of, model_files
from launcher.planning.inventory import Device, Footprint
from launcher.planning.sizing import known_footprint

CARD = Device("GPU-1", "L4", "gpu", 24 * GIB, 20 * GIB, driver="580.65")
FOUND = Footprint(5, 4, host_ram=3, how="measured", measured_at="2026-01-01", samples=9)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "hello.py").write_text("class Hello: ...")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.bin").write_bytes(b"x" * 100)
    (tmp_path / "gpufarm.toml").write_text("")
    return tmp_path


def settings_of(folder: Path, **overrides: Any) -> Settings:
    given = {"model.target": "hello:Hello", "model.args": {"weights": "weights"}} | overrides
    return load(folder / "gpufarm.toml", given, {"HOME": str(folder)})


def test_found_again_after_a_restart(folder: Path) -> None:
    state = StateDir(folder / "state").create()
    key = key_of(settings_of(folder), CARD)
    assert FootprintStore(state).find(key) is None
    FootprintStore(state).put(key, FOUND)
    FootprintStore(state).put(key | {"other": 1}, replace(FOUND, peak=9))
    assert FootprintStore(StateDir(folder / "state")).find(key) == FOUND


def test_a_directory_that_is_not_there_knows_nothing(folder: Path) -> None:
    assert FootprintStore(StateDir(folder / "none")).find({}) is None


@pytest.mark.parametrize(
    "overrides",
    [
        {"model.target": "hello:Other"},
        {"model.args": {"weights": "weights", "size": 2}},
        {"model.environment": {"PYTORCH_CUDA_ALLOC_CONF": "x"}},
        {"workers.threads": 2},
        {"footprint.requests": [{"path": "/predict", "json": 1}]},
    ],
)
def test_what_matters_changes_the_key(folder: Path, overrides: dict[str, Any]) -> None:
    assert key_of(settings_of(folder, **overrides), CARD) != key_of(settings_of(folder), CARD)


@pytest.mark.parametrize(
    "overrides",
    [{"port": 9000}, {"workers.count": 3}, {"model.name": "x"}, {"budget.headroom": "2GiB"}],
)
def test_what_does_not_matter_leaves_it(folder: Path, overrides: dict[str, Any]) -> None:
    assert key_of(settings_of(folder, **overrides), CARD) == key_of(settings_of(folder), CARD)


def test_the_device_and_its_driver_are_in_the_key_but_not_which_card(folder: Path) -> None:
    settings = settings_of(folder)
    key = key_of(settings, CARD)
    assert key_of(settings, replace(CARD, id="GPU-2", free=1, index=1)) == key
    for other in (replace(CARD, name="L40"), replace(CARD, driver="590"), replace(CARD, total=1)):
        assert key_of(settings, other) != key


def test_ram_beside_a_cpu_is_not(folder: Path) -> None:
    cpu = Device("cpu", "CPU", "cpu", 32 * GIB, 20 * GIB)
    settings = settings_of(folder)
    assert key_of(settings, cpu) == key_of(settings, replace(cpu, total=GIB, free=1))


@pytest.mark.parametrize("name", ["hello.py", "weights/model.bin"])
def test_changed_files_change_the_key(folder: Path, name: str) -> None:
    before = key_of(settings_of(folder), CARD)
    (folder / name).write_bytes(b"y" * 100)
    assert key_of(settings_of(folder), CARD) != before


def test_a_large_file_is_known_by_its_size_and_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footprint_store, "EDGE", 10)
    before = key_of(settings_of(folder), CARD)
    weights = folder / "weights" / "model.bin"
    weights.write_bytes(b"x" * 99 + b"z")
    assert key_of(settings_of(folder), CARD) != before
    weights.write_bytes(b"x" * 101)
    assert key_of(settings_of(folder), CARD) != before


def test_packages_and_commands_name_their_files(folder: Path) -> None:
    package = folder / "models" / "deep"
    (package / "__pycache__").mkdir(parents=True)
    for name in ("__init__.py", "net.py", "__pycache__/net.pyc", ".hidden"):
        (package / name).write_text("")
    settings = settings_of(folder, **{"model.target": "models.deep:Net", "model.args": {}})
    assert {path.name for path in model_files(settings)} == {"__init__.py", "net.py"}
    (folder / "serve.py").write_text("")
    command = ["python", "serve.py", "--port={port}", "--model", "weights", "", "\0"]
    given = {"model": {"command": command}, "footprint.requests": [{"path": "/"}]}
    settings = load(folder / "gpufarm.toml", given, {"HOME": str(folder)})
    assert {path.name for path in model_files(settings)} == {"serve.py", "model.bin"}


def test_secrets_stay_out_of_the_store(folder: Path) -> None:
    state = StateDir(folder / "state").create()
    settings = settings_of(folder, **{"model.environment": {"HF_TOKEN": "hf_secret"}})
    FootprintStore(state).put(key_of(settings, CARD), FOUND)
    assert "hf_secret" not in state.footprints_file.read_text()


@pytest.mark.parametrize("text", ["{half", "[]", '{"version": 99, "footprints": {}}', "null"])
def test_a_corrupt_store_is_set_aside_with_one_warning(
    folder: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = StateDir(folder / "state").create()
    state.footprints_file.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert FootprintStore(state).find({"a": 1}) is None
        FootprintStore(state).put({"a": 1}, FOUND)
    assert len(caplog.records) == (0 if text == "null" else 1)
    assert FootprintStore(state).find({"a": 1}) == FOUND


def test_a_senseless_entry_is_measured_again(folder: Path) -> None:
    state = StateDir(folder / "state").create()
    store = FootprintStore(state)
    store.put({"a": 1}, FOUND)
    data = json.loads(state.footprints_file.read_text())
    for entry in data["footprints"].values():
        entry["footprint"]["peak"] = "much"
    state.footprints_file.write_text(json.dumps(data))
    assert store.find({"a": 1}) is None


def test_a_stated_footprint_needs_no_store(folder: Path) -> None:
    settings = settings_of(folder, **{"footprint.bytes": "7GiB"})
    known = known_footprint(settings, [CARD], StateDir(folder / "none"))
    assert known == Footprint.given(7 * GIB)


def test_of_cards_that_differ_each_is_measured_and_the_larger_footprint_taken(folder: Path) -> None:
    settings, state = settings_of(folder), StateDir(folder / "state").create()
    other = replace(CARD, id="GPU-2", name="another card")
    store, larger = FootprintStore(state), replace(FOUND, steady=FOUND.steady + 1)
    assert known_footprint(settings, [CARD, other], state) is None
    store.put(key_of(settings, other), larger)
    assert known_footprint(settings, [other], state) == larger
    assert known_footprint(settings, [CARD, other], state) is None, "one has yet to be measured"
    full = replace(CARD, free=0)
    assert known_footprint(settings, [full, other], state) == larger, "it cannot be measured now"
    store.put(key_of(settings, CARD), replace(FOUND, peak=9))
    covering = known_footprint(settings, [CARD, other], state)
    assert covering == replace(larger, peak=9), "the largest of every amount"
    assert known_footprint(settings, [full], state) == replace(FOUND, peak=9)


def test_a_card_that_could_hold_no_worker_need_not_be_measured(folder: Path) -> None:
    settings, state = settings_of(folder), StateDir(folder / "state").create()
    small = replace(CARD, id="GPU-2", name="small", total=2 * GIB, free=2 * GIB)
    large = replace(FOUND, peak=5 * GIB, steady=4 * GIB)
    FootprintStore(state).put(key_of(settings, CARD), large)
    assert known_footprint(settings, [CARD, small], state) == large
