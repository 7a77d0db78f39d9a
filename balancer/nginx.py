"""The nginx program: where it is, what it is, whether it accepts a configuration."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from balancer.configuration import CONF, ERROR_LOG

USUAL_PLACES = "/usr/sbin:/usr/local/sbin:/usr/local/bin:/opt/homebrew/bin"
TEST_TIMEOUT = 30.0


class BalancerError(Exception):
    """nginx is missing, too old, or refuses its configuration. The message is one line."""


def find() -> Path:
    """The nginx program on PATH, or in the places where PATH of a plain user does not look."""
    found = shutil.which("nginx") or shutil.which("nginx", path=USUAL_PLACES)
    if found is None:
        raise BalancerError(
            "nginx is not installed: run `make setup`, or install the system's package `nginx`"
        )
    return Path(found)


def version(program: Path) -> tuple[int, ...]:
    """``(1, 22, 1)``, as the program itself says."""
    done = subprocess.run(
        [str(program), "-v"], capture_output=True, text=True, timeout=TEST_TIMEOUT, check=False
    )
    match = re.search(r"nginx/(\d+(?:\.\d+)+)", done.stderr + done.stdout)
    if match is None:
        raise BalancerError(f"{program} does not tell its version: is it nginx?")
    return tuple(int(part) for part in match.group(1).split("."))


def command(program: Path, version: tuple[int, ...], prefix: Path, conf: str = CONF) -> list[str]:
    """The command line that runs nginx in the foreground with everything below ``prefix``."""
    arguments = [str(program), "-p", f"{prefix}/", "-c", str(prefix / conf)]
    if version >= (1, 19, 5):
        # Without it nginx complains about the system's error log before it has read its file.
        arguments += ["-e", str(prefix / ERROR_LOG)]
    return arguments


def test(program: Path, version: tuple[int, ...], prefix: Path, conf: str = CONF) -> None:  # noqa: PT028 - no test
    """Let nginx itself check the written configuration; raises BalancerError with its complaint."""
    done = subprocess.run(
        [*command(program, version, prefix, conf), "-t"],
        capture_output=True,
        text=True,
        timeout=TEST_TIMEOUT,
        check=False,
    )
    complaints = [line for line in done.stderr.splitlines() if "[emerg]" in line] or [done.stderr]
    if done.returncode != 0:
        raise BalancerError(f"nginx refuses {prefix / conf}: {complaints[0].strip()}")
