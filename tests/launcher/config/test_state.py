"""The state directory: private, atomic, locked; sockets on short paths."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.config.sources import ConfigError
from launcher.config.state import LockedError, StateDir, StateError, read_json, write_json
from tests.repository import REPOSITORY


@pytest.fixture
def short() -> Iterator[Path]:
    """pytest's own folders may be too long for a socket."""
    with tempfile.TemporaryDirectory(prefix="farm-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def state(short: Path) -> Iterator[StateDir]:
    made = StateDir(short / "state").create()
    yield made
    made.remove_runtime()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_directory_is_private_to_its_user(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    made = StateDir(tmp_path / "open").create()
    assert mode(made.path) == mode(made.logs) == mode(made.cache) == 0o700
    made.create()  # again is fine


def test_a_file_in_place_of_the_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"state_dir = .*--state-dir"):
            StateDir(path).create()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="cannot be used"):
        StateDir(tmp_path / "locked" / "state").create()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_an_error_and_keeps_the_old_file(
    state: StateDir, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    write_json(state.desired_file, {"count": 1})

    def full(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateError, match="the disk is full"):
        write_json(state.desired_file, {"count": 2})
    assert read_json(state.desired_file) == {"count": 1}
    assert [path.name for path in state.path.glob(".*")] == []


def test_writing_into_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        write_json(tmp_path / "none" / "x.json", {})


def test_a_corrupt_file_is_set_aside_with_one_warning(
    state: StateDir, caplog: pytest.LogCaptureFixture
) -> None:
    state.farm_file.write_text("{half")
    with caplog.at_level(logging.WARNING):
        assert read_json(state.farm_file) is None
        assert read_json(state.farm_file) is None
    assert len(caplog.records) == 1
    assert [path.read_text() for path in state.path.glob("farm.json.corrupt-*")] == ["{half"]


def test_readers_never_see_half_a_file(state: StateDir) -> None:
    path = state.desired_file
    write_json(path, [0] * 2000)
    seen: list[Any] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.append(len(read_json(path) or []))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(50):
        write_json(path, [number] * 2000)
    done.set()
    reader.join()
    assert set(seen) == {2000}


def test_sockets_are_in_the_state_directory_where_its_path_is_short(state: StateDir) -> None:
    folder = state.runtime()
    assert folder == state.path / "run"
    assert mode(folder) == 0o700
    assert state.runtime() == StateDir(state.path).recorded_runtime() == folder
    assert list(folder.iterdir()) == [], "what was tried is removed"
    for name in ("admin.sock", "supervisor.sock", "supervisor.sock.12"):
        (folder / name).touch()
    (folder / "supervisord.pid").touch()
    state.remove_runtime()
    assert [path.name for path in folder.iterdir()] == ["supervisord.pid"]
    state.remove_runtime()  # nothing there: nothing happens


def test_the_session_s_own_directory_is_never_used(
    state: StateDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It goes away when its user logs out, and the farm stays."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert state.runtime() == state.path / "run"


@pytest.mark.parametrize("name", ["x" * 90, "a;b", "a b$c", "it's", "{a}", "a:b", "ü" * 40])
def test_sockets_are_in_tmp_where_the_state_directory_cannot_hold_them(
    short: Path, name: str
) -> None:
    made = StateDir(short / name).create()
    folder = made.runtime()
    try:
        assert folder.parent == Path("/tmp")
        assert mode(folder) == 0o700
        assert len(os.fsencode(folder / "supervisor.sock.12345678")) <= 104
        other = StateDir(short / f"{name}2").create()
        assert other.runtime() != folder
        other.remove_runtime()
        assert StateDir(made.path).runtime() == folder
    finally:
        made.remove_runtime()
    assert not folder.exists()


@pytest.mark.parametrize("name", ["state", "x" * 90])
def test_a_removed_socket_directory_is_made_again_in_the_same_place(short: Path, name: str) -> None:
    made = StateDir(short / name).create()
    folder = made.runtime()
    shutil.rmtree(folder)
    assert made.recorded_runtime() == folder
    assert made.runtime() == folder
    assert mode(folder) == 0o700
    (made.path / "runtime").unlink()
    assert made.recorded_runtime() == folder, "it is found without its record"
    (made.path / "runtime").write_text("/etc\n")
    assert made.recorded_runtime() == folder, "a record that names something else is not trusted"
    made.remove_runtime()


def test_a_folder_that_is_open_to_others_is_not_used_for_sockets(state: StateDir) -> None:
    folder = state.runtime()
    folder.chmod(0o777)
    elsewhere = state.runtime()
    assert elsewhere.parent == Path("/tmp")
    state.remove_runtime()
    shutil.rmtree(folder)
    target = state.path / "target"
    target.mkdir(mode=0o700)
    folder.symlink_to(target)
    assert state.runtime() == elsewhere
    state.remove_runtime()


def tmp_candidate(made: StateDir) -> Path:
    folder = made.runtime()
    made.remove_runtime()
    assert folder.parent == Path("/tmp")
    return folder


def test_a_link_in_tmp_is_refused_with_what_to_do(short: Path) -> None:
    made = StateDir(short / ("x" * 90)).create()
    folder = tmp_candidate(made)
    (short / "target").mkdir(mode=0o700)
    folder.symlink_to(short / "target")
    try:
        with pytest.raises(StateError, match=rf"{folder}: .*; remove what is there"):
            made.runtime()
        made.remove_runtime()
        assert folder.is_symlink()
        assert list((short / "target").iterdir()) == []
    finally:
        folder.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's folder")
def test_another_users_folder_in_tmp_is_refused(short: Path) -> None:
    made = StateDir(short / ("x" * 90)).create()
    folder = tmp_candidate(made)
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    try:
        with pytest.raises(StateError, match="belongs to another user"):
            made.runtime()
        made.remove_runtime()
        assert folder.exists()
    finally:
        folder.rmdir()


def test_two_commands_cannot_work_on_one_farm(state: StateDir) -> None:
    other = StateDir(state.path)
    with state.lock(), pytest.raises(LockedError, match=f"pid {os.getpid()}"), other.lock():
        pass
    with state.lock():
        pass


def test_the_lock_can_be_waited_for_and_ends_with_its_holder(state: StateDir) -> None:
    code = (
        "import sys; from pathlib import Path; from launcher.config.state import StateDir\n"
        "with StateDir(Path(sys.argv[1])).lock():\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(state.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(LockedError, match=f"pid {holder.pid}"), state.lock(wait=0.1):
            pass
        holder.kill()
        with state.lock(wait=30):
            pass


def test_ports_are_recorded(state: StateDir) -> None:
    assert state.ports() == ()
    state.record_ports([20001, 20002])
    assert state.ports() == (20001, 20002)
    write_json(state.ports_file, {"odd": 1})
    assert state.ports() == ()


@pytest.mark.parametrize("name", ["run", "gpufarm.toml", "logs"])
def test_a_folder_in_use_for_something_else_is_refused_and_left_alone(
    tmp_path: Path, name: str
) -> None:
    """`down` removes what a farm makes, and a farm closes its folder to others."""
    tmp_path.chmod(0o755)
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match="holds other files"):
        StateDir(tmp_path).create()
    assert mode(tmp_path) == 0o755
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_farms_own_folder_is_recognised_after_files_were_removed(state: StateDir) -> None:
    with state.lock():
        shutil.rmtree(state.logs)
        shutil.rmtree(state.cache)
        (state.path / "nginx.conf").touch()
    state.create()
    assert state.logs.is_dir()
