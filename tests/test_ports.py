"""Blocks of ports: disjoint between farms, free when chosen, kept when asked again."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from launcher.configuration.state import StateError
from launcher.processes import ports


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))


def farm(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    return folder


def test_blocks_are_disjoint_below_the_kernels_range_and_kept(tmp_path: Path) -> None:
    folders = [farm(tmp_path, name) for name in "abcdef"]
    blocks = [ports.choose(folder, 17, public=8000) for folder in folders]
    every = [port for block in blocks for port in block]
    assert len(set(every)) == 6 * 17
    assert max(every) < 32768
    for folder, block in zip(folders, blocks, strict=True):
        assert block == tuple(range(block[0], block[0] + 17))
        assert ports.choose(folder, 17, recorded=block, public=8000) == block


def test_a_port_on_which_somebody_listens_is_not_chosen(tmp_path: Path) -> None:
    folder = farm(tmp_path, "a")
    block = ports.choose(folder, 5, public=8000)
    with socket.create_server(("127.0.0.1", block[2])):
        assert not ports.is_free(block[2])
        other = ports.choose(folder, 5, recorded=block, public=8000)
        assert block[2] not in other
    assert ports.is_free(block[2])


def test_a_recorded_block_that_another_farm_took_is_given_up(tmp_path: Path) -> None:
    first, second = farm(tmp_path, "a"), farm(tmp_path, "b")
    block = ports.choose(first, 5, public=8000)
    assert set(ports.choose(second, 5, recorded=block, public=8000)).isdisjoint(block)


def test_released_blocks_and_those_of_farms_that_are_gone_are_free_again(tmp_path: Path) -> None:
    first, second, third = (farm(tmp_path, name) for name in "abc")
    block = ports.choose(first, 5, public=8000)
    ports.release(first)
    assert ports.choose(second, 5, recorded=block, public=8000) == block
    second.rmdir()
    assert ports.choose(third, 5, recorded=block, public=8000) == block


def test_a_corrupt_registry_holds_nothing_up(tmp_path: Path) -> None:
    ports.registry_file().write_text("{not json")
    block = ports.choose(farm(tmp_path, "a"), 5, public=8000)
    assert json.loads(ports.registry_file().read_text()) == {str(tmp_path / "a"): list(block)}


def test_no_room_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="free ports"):
        ports.choose(farm(tmp_path, "a"), 20_000, public=8000)


def test_the_public_port_is_no_slots(tmp_path: Path) -> None:
    folder = farm(tmp_path, "a")
    block = ports.choose(folder, 5, public=8000)
    other = ports.choose(folder, 5, recorded=block, public=block[2])
    assert block[2] not in other
