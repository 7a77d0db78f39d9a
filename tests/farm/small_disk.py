"""A file system that is soon full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.farm.harness import FarmUnderTest


@contextmanager
def small_disk(at: Path) -> Iterator[Path]:
    """A file system of a few hundred kilobytes; skipped where none may be mounted."""
    at.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(at)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs to mount a small disk")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def fill(disk: Path) -> None:
    with (disk / "full").open("ab", buffering=0) as file:
        try:
            while file.write(b"x" * 1024):
                pass
        except OSError:
            return


class FarmUnderTestAt(FarmUnderTest):
    """With its state on the small disk."""

    @property
    def state(self) -> Path:
        return self.folder / "disk" / "state"
