"""The crash guard: what it records of a crashed worker, and when it applies."""

from __future__ import annotations

from pathlib import Path

from workers.queueing.crash_guard import FILE, ROW, CrashGuard

KEY, OTHER = "a" * 32, "0123456789abcdef" * 2


def test_crash_is_visible_to_other_workers(tmp_path: Path) -> None:
    first, third = CrashGuard(tmp_path, "w1"), CrashGuard(tmp_path, "w3")
    assert third.ended(KEY) == 0
    first.begin(KEY)
    assert third.ended(KEY) == 1
    first = CrashGuard(tmp_path, "w1")  # its successor, which runs something else meanwhile
    first.begin(OTHER)
    first.end()
    assert third.ended(KEY) == 1
    third.begin(KEY)
    assert CrashGuard(tmp_path, "w2").ended(KEY) == 2
    assert (tmp_path / FILE).stat().st_size == 3 * ROW


def test_finished_request_is_cleared(tmp_path: Path) -> None:
    crash_guard = CrashGuard(tmp_path, "w1")
    crash_guard.begin(KEY)
    crash_guard.end()
    assert CrashGuard(tmp_path, "w1").ended(KEY) == 0


def test_row_does_not_grow(tmp_path: Path) -> None:
    for number in range(10):
        CrashGuard(tmp_path, "w1").begin(f"{number:032x}")
    assert (tmp_path / FILE).stat().st_size == ROW
    assert CrashGuard(tmp_path, "w1").ended(f"{9:032x}") == 1
    assert CrashGuard(tmp_path, "w1").ended(f"{0:032x}") == 0


def test_only_ids_of_the_balancer_count(tmp_path: Path) -> None:
    crash_guard = CrashGuard(tmp_path, "w1")
    for header in ("", "abc", "A" * 32, "a" * 33, "\0" * 32):
        assert CrashGuard.key(header) == ""
    assert CrashGuard.key(KEY) == KEY
    assert crash_guard.ended("") == 0


def test_without_a_file_nothing_is_rejected(tmp_path: Path) -> None:
    for crash_guard in (
        CrashGuard(None, "w1"),
        CrashGuard(tmp_path / "missing", "w1"),
        CrashGuard(tmp_path, "alone"),
    ):
        crash_guard.begin(KEY)
        assert crash_guard.ended(KEY) == 0
        crash_guard.end()
