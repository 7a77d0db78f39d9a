"""What is shipped: the wheel holds every file of its packages, and the image installs the same."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from launcher.config.settings import Settings, WorkersSettings
from launcher.supervision.supervisord import GRACE_AFTER_REQUEST
from tests.repository import REPOSITORY
from tests.test_architecture import PROJECT, normal, requirement_names

PACKAGES = ("balancer", "launcher", "loadtest", "workers")
LARGEST_WHEEL = 40 * 10**6
"""Bytes; the demo voice is most of it."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_is_no_burden(wheel: Path) -> None:
    assert wheel.stat().st_size < LARGEST_WHEEL


def test_the_wheel_holds_every_tracked_file(wheel: Path) -> None:
    """Templates, the voice's weights and word lists as well as the modules."""
    done = subprocess.run(
        ["git", "ls-files", "-z", *PACKAGES],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    wanted = {name for name in done.stdout.split("\0") if name and (REPOSITORY / name).is_file()}
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "balancer/templates/nginx.conf.j2",
        "launcher/supervision/templates/supervisord.conf.j2",
    } <= wanted
    assert not wanted - held


def test_the_wheel_has_a_command_and_a_licence(wheel: Path) -> None:
    files = zipfile.ZipFile(wheel)
    (points,) = (name for name in files.namelist() if name.endswith("entry_points.txt"))
    assert "gpufarm = launcher.cli.__main__:main" in files.read(points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in files.namelist())
    assert {name.partition("/")[0] for name in files.namelist()} == {
        *PACKAGES,
        points.partition("/")[0],
    }


def test_the_image_asks_for_the_same_torch() -> None:
    wanted = [r for r in PROJECT["optional-dependencies"]["torch"] if r.startswith("torch>")]
    text = (REPOSITORY / "deploy" / "Dockerfile").read_text("utf-8")
    assert set(re.findall(r'^ARG TORCH="(.+)"$', text, re.MULTILINE)) == set(wanted)


def test_the_lock_has_an_exact_version_of_every_requirement() -> None:
    """Except for the onnxruntimes, of which a machine has one or the other."""
    lines = (REPOSITORY / "constraints.txt").read_text("utf-8").splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    locked = {normal(line.partition("==")[0]) for line in lines}
    extras = PROJECT["optional-dependencies"]
    required = requirement_names("", *(extra for extra in extras if not extra.startswith("onnx")))
    assert not required - locked
    assert not locked & {"onnxruntime", "onnxruntime-gpu", "gpufarm"}


def test_compose_hands_every_key_on() -> None:
    """Compose forwards no family of variables: each stands there by its name."""
    text = (REPOSITORY / "docker-compose.yml").read_text("utf-8")
    named = set(re.findall(r"^ +(GPUFARM_\w+):", text, re.MULTILINE))
    keys = {"GPUFARM_CONFIG"}
    for name, field in Settings.model_fields.items():
        if field.json_schema_extra:
            continue
        section = getattr(field.annotation, "model_fields", None)
        keys |= {f"GPUFARM_{name}__{key}".upper() for key in section or ()}
        keys |= set() if section else {f"GPUFARM_{name}".upper()}
    assert named == keys


def test_the_container_is_given_the_time_to_drain() -> None:
    """nginx first, then the workers, each until supervisord would kill it."""
    text = (REPOSITORY / "docker-compose.yml").read_text("utf-8")
    (grace,) = re.findall(r"STOP_GRACE_PERIOD:-(\d+)s", text)
    assert int(grace) > 2 * (WorkersSettings().request_timeout + GRACE_AFTER_REQUEST) + 10
