"""The command line: at once, one line for each error, and nothing imported that help needs not."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

from launcher.command.listing import curl_line
from launcher.configuration.config import load
from launcher.planning.inventory import Footprint, Host
from launcher.planning.plan import Limits, plan
from tests.farm_records import farm_of

HEAVY = ("torch", "onnxruntime", "starlette", "uvicorn", "rich.console", "jinja2", "psutil")
COMMANDS = ("up", "down", "ps", "plan", "scale", "drain", "restart", "logs", "doctor")


def gpufarm(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GPUFARM_")}
    return subprocess.run(
        [sys.executable, "-P", "-m", "launcher.command", *arguments],
        cwd=folder,
        env=environment | {"XDG_STATE_HOME": str(folder / "state-home")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_lists_every_command(tmp_path: Path) -> None:
    told = gpufarm(tmp_path, "--help")
    assert told.returncode == 0
    assert all(f"\n  {command}" in told.stdout for command in COMMANDS)
    assert list(tmp_path.iterdir()) == []


def test_its_version(tmp_path: Path) -> None:
    told = gpufarm(tmp_path, "--version")
    assert (told.returncode, told.stdout.strip()) == (0, metadata.version("gpufarm"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('footprint.requests = [{ path = "/predict", json = { text = "it\'s" } }]', "it's"),
        ('footprint.requests = [{ path = "/get" }]', "…"),
        ("", "…"),
    ],
)
def test_a_farm_is_tried_with_a_request_that_it_knows(
    tmp_path: Path, text: str, shown: str
) -> None:
    (tmp_path / "gpufarm.toml").write_text(f'{text}\nmodel.target = "a:B"\n')
    settings = load(tmp_path / "gpufarm.toml", {}, {"HOME": str(tmp_path)})
    planned = plan([], Footprint.given(1), Host(), Limits())
    farm = farm_of(settings, planned)
    words = shlex.split(curl_line(farm, {"workers": [{"health": {}}]}))
    assert words[1] == f"{farm.url}/predict"
    assert (json.loads(words[-1])["text"] if words[-1] != "…" else "…") == shown


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(tmp_path: Path, command: str) -> None:
    told = gpufarm(tmp_path, command, "--help")
    assert told.returncode == 0
    assert "--config" in told.stdout
    assert "--state-dir" in told.stdout


@pytest.mark.parametrize("command", [["--help"], ["plan", "--help"], ["up", "--help"]])
def test_help_imports_nothing_heavy(tmp_path: Path, command: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["gpufarm", *{command!r}]
from launcher.command.__main__ import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[]"


def test_a_plan_imports_no_engine_and_no_server(tmp_path: Path) -> None:
    code = """
import sys
sys.argv = ["gpufarm", "plan", "--device", "24GiB", "--device", "24GiB", "--footprint", "7GiB"]
from launcher.command.__main__ import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print([n for n in ("torch", "onnxruntime", "starlette", "uvicorn") if n in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_three_and_three_fit_on_two_imagined_devices(tmp_path: Path) -> None:
    arguments = ("--device", "24GiB", "--device", "24GiB", "--footprint", "7GiB", "--json")
    plan = json.loads(gpufarm(tmp_path, "plan", *arguments).stdout)
    assert [device["workers"] for device in plan["devices"]] == [3, 3]
    assert plan["total_workers"] == 6
    assert all(device["headroom"] > 0 for device in plan["devices"])


def test_what_does_not_fit_is_3_with_the_numbers(tmp_path: Path) -> None:
    told = gpufarm(tmp_path, "plan", "--device", "4GiB", "--footprint", "7GiB")
    assert told.returncode == 3
    assert "7 GiB" in told.stderr


@pytest.mark.parametrize(
    ("arguments", "file", "words"),
    [
        (["up"], "prot = 1", "prot"),
        (["ps"], "port = 'x'", "port"),
        (["up", "--port", "99999"], "", "port"),
        (["up", "--workers", "-1"], "", "count"),
        (["up", "--config", "missing.toml"], "", "missing.toml"),
    ],
)
def test_a_wrong_configuration_is_one_line_and_2(
    tmp_path: Path, arguments: list[str], file: str, words: str
) -> None:
    (tmp_path / "gpufarm.toml").write_text(file)
    told = gpufarm(tmp_path, *arguments)
    assert told.returncode == 2
    assert len(told.stderr.splitlines()) == 1
    assert words in told.stderr


def test_a_wrong_option_is_2(tmp_path: Path) -> None:
    for arguments in (["scale"], ["scale", "-3"], ["scale", "x"], ["nothing"], ["ps", "--nothing"]):
        told = gpufarm(tmp_path, *arguments)
        assert told.returncode == 2
        assert "Traceback" not in told.stderr


@pytest.mark.parametrize("command", [["ps"], ["down"], ["scale", "1"], ["drain", "w1"], ["logs"]])
def test_without_a_farm_it_is_4_and_nothing_is_created(tmp_path: Path, command: list[str]) -> None:
    told = gpufarm(tmp_path, *command)
    assert told.returncode == 4
    assert len(told.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_help_feels_instant(tmp_path: Path) -> None:
    """Generous, for loaded machines; it takes a tenth of a second."""
    begun = time.monotonic()
    gpufarm(tmp_path, "plan", "--help")
    assert time.monotonic() - begun < 3


@pytest.mark.parametrize("options", [["--cores", "-1"], ["--ram", "x"], ["--workers", "0"]])
def test_what_a_plan_is_asked_for_is_checked(tmp_path: Path, options: list[str]) -> None:
    told = gpufarm(tmp_path, "plan", "--footprint", "1GiB", *options)
    assert told.returncode == 2
    assert len(told.stderr.splitlines()) == 1


def test_logs_of_what_has_written_none(tmp_path: Path) -> None:
    (tmp_path / "state" / "logs").mkdir(parents=True)
    (tmp_path / "state" / "logs" / "w1.log").write_text("hello\n")
    assert "hello" in gpufarm(tmp_path, "logs", "w1", "--state-dir", "state").stdout
    told = gpufarm(tmp_path, "logs", "w9", "--state-dir", "state")
    assert told.returncode == 2
    assert "w9: it has written nothing yet, or does not exist; logs: w1" in told.stderr
