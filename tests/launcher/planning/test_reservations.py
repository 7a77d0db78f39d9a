"""What farms reserve of a machine's memory: read by others, gone with its owner, hard to abuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.config.sizes import GIB
from launcher.planning import reservations
from tests.waiting import until

HOLDER = """
import sys
from pathlib import Path
from launcher.planning import reservations
reservations.PARENTS = (Path(sys.argv[1]),)
with reservations.locked():
    reservations.reserve(Path(sys.argv[2]), {"cpu": 5 << 30, "GPU-1": 7})
    print("reserved", flush=True)
    sys.stdin.readline()
print("unlocked", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine's place for such files, of this test alone."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    monkeypatch.setattr(reservations, "PARENTS", (shared,))
    return shared


@contextmanager
def holder(place: Path, state: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has reserved memory and still holds the lock."""
    command = [sys.executable, "-c", HOLDER, str(place), str(state)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reserved\n"
        try:
            yield process
        finally:
            process.kill()


def test_another_farm_sees_it_and_the_farm_itself_does_not(place: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert reservations.others(one) == {}
    reservations.reserve(one, {"GPU-1": 5 * GIB, "GPU-2": 0})
    assert reservations.others(two) == {"GPU-1": 5 * GIB}
    assert reservations.others(one) == {}
    reservations.reserve(two, {"GPU-1": 1, "cpu": 2})
    assert reservations.others(tmp_path / "three") == {"GPU-1": 5 * GIB + 1, "cpu": 2}
    reservations.reserve(one, {"GPU-1": 4})
    assert reservations.others(two) == {"GPU-1": 4}
    reservations.release(one)
    reservations.reserve(two, {"cpu": 0})
    assert reservations.others(tmp_path / "three") == {}
    reservations.release(one)


def test_it_is_gone_a_while_after_its_process(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holder(place, tmp_path / "one") as process:
        assert reservations.others(tmp_path / "two") == {"cpu": 5 * GIB, "GPU-1": 7}
        monkeypatch.setattr(reservations, "KEPT_SECONDS", 0.0)
        assert reservations.others(tmp_path / "two"), "its process lives"
        process.kill()
        until(lambda: not reservations.others(tmp_path / "two"), "the end of the reservation")
    assert not list((place / reservations.FOLDER).glob("*.json")), "it was cleared away"


def test_a_reused_pid_or_another_boot_does_not_keep_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for change in ({"started": 1}, {"boot": "another"}, {"pid": 2**22 + 11}):
        reservations.reserve(tmp_path / "one", {"cpu": 1})
        (file,) = (place / reservations.FOLDER).glob("*.json")
        record = json.loads(file.read_text())
        file.write_text(json.dumps(record | {"owner": record["owner"] | change, "renewed": 0}))
        assert reservations.others(tmp_path / "two") == {}, change


def test_the_lock_is_held_by_one_process(place: Path, tmp_path: Path) -> None:
    with holder(place, tmp_path / "one") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        handle = os.open(place / reservations.FOLDER / reservations.LOCK, os.O_RDWR)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(reservations, "LOCK_SECONDS", 0.2)
                assert not reservations._flock(handle)
                with reservations.locked():
                    pass  # it goes on, with a warning
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "unlocked\n"
            assert reservations._flock(handle)
        finally:
            os.close(handle)


def test_links_and_files_of_other_users_are_ignored(place: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text(json.dumps({"owner": {}, "devices": {"cpu": 1}}))
    reservations.reserve(tmp_path / "one", {"cpu": 3})
    (file,) = (place / reservations.FOLDER).glob("*.json")
    good = json.loads(file.read_text())
    folder = file.parent
    (folder / f"{os.getuid()}-link.json").symlink_to(file)
    (folder / f"{os.getuid() + 1}-claimed.json").write_text(json.dumps(good))
    (folder / f"{os.getuid()}-list.json").write_text("[]")
    (folder / f"{os.getuid()}-deep.json").write_text("[" * 100_000)
    bad = ("x", -1, True, 1 << 70, None, 1.5)
    for index, size in enumerate(bad):
        changed = json.dumps(good | {"devices": {"cpu": size}})
        (folder / f"{os.getuid()}-{index}.json").write_text(changed)
    os.mkfifo(folder / f"{os.getuid()}-pipe.json")
    assert reservations.others(tmp_path / "two") == {"cpu": 3}
    file.unlink()
    file.symlink_to(victim)
    before = victim.read_text()
    reservations.reserve(tmp_path / "one", {"cpu": 4})
    assert victim.read_text() == before
    assert not file.is_symlink()
    (folder / reservations.LOCK).unlink(missing_ok=True)
    (folder / reservations.LOCK).symlink_to(tmp_path / "made")
    with reservations.locked():
        pass
    assert not (tmp_path / "made").exists()


def test_a_place_that_is_not_fit_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    private, link, shared = tmp_path / "private", tmp_path / "link", tmp_path / "shared"
    private.mkdir(mode=0o700)
    shared.mkdir()
    shared.chmod(0o1777)
    link.symlink_to(shared)
    monkeypatch.setattr(reservations, "PARENTS", (tmp_path / "none", private, link))
    with reservations.locked():
        reservations.reserve(tmp_path / "one", {"cpu": 1})
    assert reservations.others(tmp_path / "two") == {}
    assert "no directory for reservations" in caplog.text
    assert not any([*private.iterdir(), *shared.iterdir()])
    (shared / reservations.FOLDER).symlink_to(private)
    monkeypatch.setattr(reservations, "PARENTS", (shared,))
    reservations.reserve(tmp_path / "one", {"cpu": 1})
    assert not list(private.iterdir())


def test_the_directory_is_open_to_all_users_whatever_the_umask(place: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with reservations.locked():
            reservations.reserve(tmp_path / "one", {"cpu": 1})
    finally:
        os.umask(before)
    folder = place / reservations.FOLDER
    modes = {path.name: path.stat().st_mode & 0o7777 for path in (folder, *folder.iterdir())}
    assert modes.pop(reservations.FOLDER) == 0o1777
    assert modes.pop(reservations.LOCK) == 0o666
    assert list(modes.values()) == [0o644]
    assert [path.name for path in place.iterdir()] == [reservations.FOLDER]
