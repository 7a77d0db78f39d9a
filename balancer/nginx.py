"""The nginx program: find it, read its version, check a configuration with it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from balancer.configuration import CONF, ERROR_LOG

SYSTEM_PATH = "/usr/sbin:/usr/local/sbin:/usr/local/bin:/opt/homebrew/bin"
TEST_TIMEOUT = 30.0
"""Seconds."""


class BalancerError(Exception):
    """nginx is missing, too old, or rejects its configuration. The message is one line."""


def find() -> Path:
    """Find nginx on PATH, or in system folders that are often missing there."""
    found = shutil.which("nginx") or shutil.which("nginx", path=SYSTEM_PATH)
    if found is None:
        raise BalancerError(
            "nginx is not installed: run `make setup`, or install the system's package `nginx`"
        )
    return Path(found)


def version(program: Path) -> tuple[int, ...]:
    """Return the program's version, such as ``(1, 22, 1)``."""
    done = subprocess.run(
        [str(program), "-v"], capture_output=True, text=True, timeout=TEST_TIMEOUT, check=False
    )
    match = re.search(r"nginx/(\d+(?:\.\d+)+)", done.stderr + done.stdout)
    if match is None:
        raise BalancerError(f"{program} reports no nginx version; put nginx first on PATH")
    return tuple(int(part) for part in match.group(1).split("."))


def command(program: Path, version: tuple[int, ...], prefix: Path, conf: str = CONF) -> list[str]:
    """Return the command that runs nginx in the foreground with its files below ``prefix``."""
    arguments = [str(program), "-p", f"{prefix}/", "-c", str(prefix / conf)]
    if version >= (1, 19, 5):
        # Without it nginx opens the system's error log before it reads its configuration.
        arguments += ["-e", str(prefix / ERROR_LOG)]
    return arguments


def test(program: Path, version: tuple[int, ...], prefix: Path, conf: str = CONF) -> None:  # noqa: PT028 - no test
    """Have nginx check a configuration file; raises BalancerError with its error."""
    done = subprocess.run(
        [*command(program, version, prefix, conf), "-t"],
        capture_output=True,
        text=True,
        timeout=TEST_TIMEOUT,
        check=False,
    )
    errors = [line for line in done.stderr.splitlines() if "[emerg]" in line] or [done.stderr]
    if done.returncode != 0:
        raise BalancerError(f"nginx rejects {prefix / conf}: {errors[0].strip()}")
