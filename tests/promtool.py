"""Prometheus's own check of a metrics page."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def check(page: str) -> None:
    """Assert that the page parses, and that names, types and help texts keep Prometheus's rules."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed: it is in Debian's package prometheus")
    done = subprocess.run(
        [program, "check", "metrics"],
        input=page,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), page
