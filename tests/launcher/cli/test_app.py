"""The command line: instant help, one line for each error, and the exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from launcher.cli.output import console, example_request, print_workers
from launcher.config.settings import load
from launcher.config.sizes import GIB
from launcher.config.state import StateDir
from launcher.planning.inventory import Footprint, Host
from launcher.planning.plan import Limits, plan
from launcher.supervision.farm import Farm, Generation

UUID = "GPU-0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9"
HEAVY = ("torch", "onnxruntime", "starlette", "uvicorn", "rich.console", "jinja2", "psutil")
COMMANDS = ("up", "down", "ps", "plan", "scale", "drain", "restart", "logs", "doctor")


def gpufarm(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GPUFARM_")}
    return subprocess.run(
        [sys.executable, "-P", "-m", "launcher.cli", *arguments],
        cwd=folder,
        env=environment | {"XDG_STATE_HOME": str(folder / "state-home")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_lists_every_command(tmp_path: Path) -> None:
    result = gpufarm(tmp_path, "--help")
    assert result.returncode == 0
    assert all(f"\n  {command}" in result.stdout for command in COMMANDS)
    assert list(tmp_path.iterdir()) == []


def test_version_is_printed(tmp_path: Path) -> None:
    result = gpufarm(tmp_path, "--version")
    assert (result.returncode, result.stdout.strip()) == (0, metadata.version("gpufarm"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('footprint.requests = [{ path = "/predict", json = { text = "it\'s" } }]', "it's"),
        ('footprint.requests = [{ path = "/get" }]', "…"),
        ("", "…"),
    ],
)
def test_the_example_request_is_one_of_the_configuration(
    tmp_path: Path, text: str, expected: str
) -> None:
    (tmp_path / "gpufarm.toml").write_text(f'{text}\nmodel.target = "a:B"\n')
    settings = load(tmp_path / "gpufarm.toml", {}, {"HOME": str(tmp_path)})
    planned = plan([], Footprint.given(1), Host(), Limits())
    farm = Farm(StateDir(tmp_path), Generation(1, settings, planned, ""), ())
    words = shlex.split(example_request(farm, {"workers": [{"health": {}}]}))
    assert words[1] == f"{farm.url}/predict"
    assert (json.loads(words[-1])["text"] if words[-1] != "…" else "…") == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(tmp_path: Path, command: str) -> None:
    result = gpufarm(tmp_path, command, "--help")
    assert result.returncode == 0
    assert "--config" in result.stdout
    assert "--state-dir" in result.stdout


@pytest.mark.parametrize("command", [["--help"], ["plan", "--help"], ["up", "--help"]])
def test_help_imports_nothing_heavy(tmp_path: Path, command: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["gpufarm", *{command!r}]
from launcher.cli.__main__ import main
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
from launcher.cli.__main__ import main
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


def test_three_workers_fit_on_each_of_two_hypothetical_devices(tmp_path: Path) -> None:
    arguments = ("--device", "24GiB", "--device", "24GiB", "--footprint", "7GiB", "--json")
    plan = json.loads(gpufarm(tmp_path, "plan", *arguments).stdout)
    assert [device["workers"] for device in plan["devices"]] == [3, 3]
    assert plan["total_workers"] == 6
    assert all(device["headroom"] > 0 for device in plan["devices"])


def test_a_plan_that_does_not_fit_exits_with_3_and_the_numbers(tmp_path: Path) -> None:
    result = gpufarm(tmp_path, "plan", "--device", "4GiB", "--footprint", "7GiB")
    assert result.returncode == 3
    assert "7 GiB" in result.stderr


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
def test_a_wrong_configuration_exits_with_2_and_one_line(
    tmp_path: Path, arguments: list[str], file: str, words: str
) -> None:
    (tmp_path / "gpufarm.toml").write_text(file)
    result = gpufarm(tmp_path, *arguments)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert words in result.stderr


def test_a_wrong_option_exits_with_2(tmp_path: Path) -> None:
    for arguments in (["scale"], ["scale", "-3"], ["scale", "x"], ["nothing"], ["ps", "--nothing"]):
        result = gpufarm(tmp_path, *arguments)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", [["ps"], ["down"], ["scale", "1"], ["drain", "w1"], ["logs"]])
def test_without_a_farm_commands_exit_with_4_and_create_nothing(
    tmp_path: Path, command: list[str]
) -> None:
    result = gpufarm(tmp_path, *command)
    assert result.returncode == 4
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_help_is_instant(tmp_path: Path) -> None:
    """Generous, for loaded machines; it takes a tenth of a second."""
    started = time.monotonic()
    gpufarm(tmp_path, "plan", "--help")
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("options", [["--cores", "-1"], ["--ram", "x"], ["--workers", "0"]])
def test_options_of_plan_are_validated(tmp_path: Path, options: list[str]) -> None:
    result = gpufarm(tmp_path, "plan", "--footprint", "1GiB", *options)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1


def printed_workers(width: int | None) -> list[str]:
    """The table of two workers, on a terminal of that width or written to a file."""
    worker = {
        "pid": 123456,
        "port": 20001,
        "device": UUID,
        "state": "ready",
        "memory_bytes": 7 * GIB,
        "restarts": 3,
        "ready_seconds": 12.3,
        "error": None,
    }
    failed = {"state": "failed", "error": "w2 could not load: there are no weights in model.bin"}
    stream = io.StringIO()
    out = Console(file=stream, width=width, force_terminal=True) if width else console(stream)
    workers = [worker | {"id": "w1"}, worker | {"id": "w2"} | failed]
    print_workers({"workers": workers, "generation": {"failure": None}}, out)
    return re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue()).splitlines()


@pytest.mark.parametrize(
    ("width", "titles"),
    [
        (40, "Worker State Device Memory"),
        (60, "Worker State Pid Device Memory Restarts"),
        (80, "Worker State Pid Port Device Memory Restarts Ready after"),
        (20, "Worker State"),
    ],
)
def test_the_table_of_workers_has_as_many_columns_as_fit(width: int, titles: str) -> None:
    lines = printed_workers(width)
    assert all(len(line) <= width for line in lines)
    assert lines[0].split() == titles.split()
    assert lines[1].split()[:2] == ["w1", "ready"]
    assert lines[2].split()[:2] == ["w2", "failed"]
    assert " ".join(line.strip() for line in lines[3:]).startswith("w2 could not load: there")
    assert "GPU-0a1b2c3d…" in lines[1] or "Device" not in titles


def test_without_a_terminal_every_column_is_printed_in_full() -> None:
    titles, first, _, error = printed_workers(None)
    assert titles.split()[-2:] == ["Ready", "after"]
    assert UUID in first
    assert error.endswith("model.bin")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["ps"], 4, "no farm is running"),
        (["down"], 4, "no farm is running"),
        (["plan", "--device", "24"], 2, "write 24GiB"),
        (["up", "--port", "99999"], 2, "port = 99999"),
        (["plan", "--measure"], 1, "could not load"),
        (["ps", "--nothing"], 2, "No such option"),
        (["nothing"], 2, "No such command"),
        (["scale"], 2, "Missing argument"),
    ],
)
def test_with_json_an_error_is_json(
    tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    (tmp_path / "gpufarm.toml").write_text('model.target = "nowhere:Nothing"')
    result = gpufarm(tmp_path, *arguments, "--json")
    assert result.returncode == code
    error = json.loads(result.stdout)["error"]
    assert error["code"] == code
    assert words in error["message"]
    assert "Traceback" not in result.stderr


def test_doctor_reports_lost_records_as_a_finding(tmp_path: Path) -> None:
    """A process with supervisord's arguments takes its place."""
    state = tmp_path / "state"
    (state / "logs").mkdir(parents=True)
    marks = ["launcher.supervision.run_supervisord", str(state / "supervisord.conf")]
    with subprocess.Popen([sys.executable, "-c", "input()", *marks], stdin=subprocess.PIPE) as lost:
        result = gpufarm(tmp_path, "doctor", "--state-dir", "state", "--json")
        lost.communicate(b"\n")
    finding = next(one for one in json.loads(result.stdout) if one["check"] == "state")
    assert not finding["ok"]
    assert "records of the farm" in finding["message"]
    assert "gpufarm down" in finding["message"]
    assert result.returncode == 1


def test_logs_of_a_process_without_a_log_exit_with_2(tmp_path: Path) -> None:
    (tmp_path / "state" / "logs").mkdir(parents=True)
    (tmp_path / "state" / "logs" / "w1.log").write_text("hello\n")
    assert "hello" in gpufarm(tmp_path, "logs", "w1", "--state-dir", "state").stdout
    as_json = gpufarm(tmp_path, "logs", "w1", "--state-dir", "state", "--json")
    assert json.loads(as_json.stdout)["message"] == "hello"
    result = gpufarm(tmp_path, "logs", "w9", "--state-dir", "state")
    assert result.returncode == 2
    assert "w9 has no log, or has written nothing yet; logs: w1" in result.stderr
