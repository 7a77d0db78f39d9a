"""`gpufarm plan` as it is called: what it prints, and its exit codes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.cli import output
from launcher.cli import plan as plan_command
from launcher.config.settings import ConfigError, Settings, load
from launcher.config.sizes import GIB
from launcher.config.state import StateDir
from launcher.planning.footprint import MeasureError
from launcher.planning.inventory import Device, Footprint, Host, Tenant
from launcher.planning.plan import Limits, plan
from launcher.supervision.farm import Farm, Generation
from tests.repository import REPOSITORY


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "hello.py").write_text(
        "class Hello:\n"
        "    def setup(self, device): ...\n"
        "    def predict(self, request): return request\n"
    )
    (tmp_path / "gpufarm.toml").write_text("")
    given = {
        "state_dir": str(tmp_path / "state"),
        "model.target": "hello:Hello",
        "budget.devices": ["cpu"],
    }
    return load(tmp_path / "gpufarm.toml", given, {"HOME": str(tmp_path)})


def json_of(capsys: pytest.CaptureFixture[str], code: int, **options: Any) -> Any:
    assert plan_command.run(as_json=True, **options) == code
    return json.loads(capsys.readouterr().out)


def test_a_plan_for_two_hypothetical_devices(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan_command.run(settings, ["24GiB", "24GiB"], "7GiB") == 0
    out = capsys.readouterr().out
    for words in (
        "6 workers (3 + 3), bound by device memory",
        "1.2 GiB",
        "22.8 GiB",
        "7 GiB serving",
        "(given)",
        "not considered",
        "5.2 GiB more",
        "= 3",
        "workers.max",
    ):
        assert words in out


def test_a_plan_as_json(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    result = json_of(capsys, 0, settings=settings, devices=["24GiB", "24GiB"], footprint="7GiB")
    assert [row["workers"] for row in result["devices"]] == [3, 3]
    assert result["total_workers"] == 6
    assert result["binding"] == "memory"
    assert result["caps"] == {"memory": 6, "ram": None, "cores": None, "max": 16}
    assert result["devices"][0]["headroom"] == 24 * GIB // 20


def test_hypothetical_devices_ignore_this_host_except_for_given_cores_and_ram(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"settings": settings, "devices": ["240GiB"], "footprint": "1GiB"}
    assert json_of(capsys, 0, **given)["total_workers"] == 16
    result = json_of(capsys, 0, **given, cores=3, ram="64GiB")
    assert (result["total_workers"], result["binding"]) == (3, "cores")


def test_a_plan_without_room_exits_with_3_and_the_numbers(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan_command.run(settings, ["4GiB"], "7GiB") == 3
    streams = capsys.readouterr()
    assert "4 GiB too little" in streams.out
    assert streams.err.startswith("gpufarm: 1 worker does not fit: memory allows 0 (7 GiB each")
    assert streams.err.count("\n") == 1
    result = json_of(capsys, 3, settings=settings, devices=["4GiB"], footprint="7GiB")
    assert result["total_workers"] == 0
    assert "7 GiB each" in result["refusal"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"devices": ["big"]}, "--device big"),
        ({"devices": ["24GiB"], "footprint": "seven"}, "--footprint seven"),
        ({"devices": ["24GiB"], "footprint": "7GiB", "ram": "-1"}, "--ram -1"),
        ({"footprint": "0"}, "--footprint 0"),
        ({"footprint": "0GiB"}, "--footprint 0GiB: must be larger than 0 bytes"),
        ({"devices": ["24"]}, "--device 24: has no unit; write 24GiB"),
        ({"devices": ["24GiB"], "footprint": "7"}, "--footprint 7: has no unit"),
        ({"devices": ["24GiB"], "footprint": "7GiB", "ram": "64"}, "--ram 64: has no unit"),
        (
            {"devices": ["24GiB"], "footprint": "7GiB", "cores": -1},
            "--cores must be a whole number of at least 1, got -1",
        ),
    ],
)
def test_bad_sizes_name_the_option(settings: Settings, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_command.run(settings, **options)


def test_an_unknown_footprint_is_reported_with_the_remedy(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan_command.run(settings) == 1
    streams = capsys.readouterr()
    assert "cpu" in streams.out
    assert "gpufarm plan --measure" in streams.err
    assert not settings.state_dir.exists(), "nothing was started, nothing was written"
    result = json_of(capsys, 1, settings=settings)
    assert result["total_workers"] is None
    assert result["devices"][0]["device"]["id"] == "cpu"
    assert plan_command.run(settings, ["24GiB"]) == 1


def test_a_measured_footprint_is_kept(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan_command.run(settings, measure=True) == 0
    first = capsys.readouterr()
    assert "starting one worker" in first.err
    assert "(measured" in first.out
    assert "measured without a request" in first.out, "this class names no longest request"
    assert plan_command.run(settings) == 0
    assert "(measured" in capsys.readouterr().out
    result = json_of(capsys, 0, settings=settings, devices=["24GiB"])
    assert result["footprint"]["how"] == "measured"
    assert plan_command.run(settings, measure=True) == 0
    assert "starting one worker" in capsys.readouterr().err, "as was asked"
    with pytest.raises(ConfigError, match="mutually exclusive"):
        plan_command.run(settings, footprint="1GiB", measure=True)


def test_a_failed_measurement_is_one_line(settings: Settings) -> None:
    (settings.folder / "hello.py").write_text("raise OSError('no weights')")
    with pytest.raises(MeasureError, match=r"^the worker could not load: model\.target") as caught:
        plan_command.run(settings, measure=True)
    assert "no weights" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_plan_of_a_running_farm_is_printed_as_it_is(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    card = Device("GPU-1", "L4", "gpu", 24 * GIB, 24 * GIB)
    planned = plan([card], Footprint.given(7 * GIB), Host(), Limits())
    running = Farm(StateDir(settings.state_dir), Generation(1, settings, planned, ""), ())
    assert plan_command.run(settings, running=running) == 0
    out = capsys.readouterr().out
    assert "running farm" in out
    assert "L4" in out
    assert "has changed" not in out
    (settings.folder / "gpufarm.toml").write_text("workers.threads = 2\n")
    given = {"state_dir": str(settings.state_dir), "model.target": "hello:Hello"}
    changed = load(settings.folder / "gpufarm.toml", given, {"HOME": str(settings.folder)})
    assert plan_command.run(changed, running=running) == 0
    assert "has changed since; apply it with `gpufarm up`" in capsys.readouterr().out


def formatted(result: Any) -> str:
    stream = io.StringIO()
    output.print_plan(result, Console(file=stream, width=200), ["A note."])
    return stream.getvalue()


def test_a_printed_plan_has_every_number() -> None:
    tenants = (Tenant(41, "python", 2 * GIB), Tenant(42))
    card = Device("GPU-1", "NVIDIA L4", "gpu", 24 * GIB, 20 * GIB, tenants=tenants)
    measured = Footprint(
        6 * GIB, 5 * GIB, 2 * GIB, "measured", "2026-01-02T03:04:05+00:00", "NVIDIA L4", 321, 9
    )
    host = Host(8, 64 * GIB, 40 * GIB, "cgroup v2 quota", "MemAvailable")
    out = formatted(plan([card], measured, host, Limits()))
    for words in (
        "A note.",
        "python 41 (2 GiB), process 42",
        "5 GiB serving, 6 GiB starting, 2 GiB of host RAM",
        "measured 2026-01-02T03:04:05+00:00 on NVIDIA L4: 321 samples, 9 requests",
        "1 + floor((20 GiB free - 1.2 GiB headroom - 5 GiB first worker - 1 GiB start)",
        " / 5 GiB) = 3",
        "8 cores (cgroup v2 quota), 1 thread each",
        "2 GiB each of 40 GiB (MemAvailable)",
        "3 workers, bound by device memory.",
    ):
        assert words in out


def test_a_printed_plan_names_other_bounds() -> None:
    card = Device("GPU-1", "L4", "gpu", 24 * GIB, 20 * GIB)
    one = Footprint.given(5 * GIB)
    assert "budget.memory" in formatted(plan([card], one, Host(), Limits(memory=11 * GIB)))
    assert "up to 3 with gpufarm scale" in formatted(plan([card], one, Host(cores=1), Limits()))
    assert "bound by workers.count" in formatted(plan([card], one, Host(), Limits(count=2)))
    assert "admits only one process" in formatted(
        plan([replace(card, exclusive=True)], one, Host(), Limits())
    )
    assert "does not fit" in formatted(plan([], one, Host(), Limits()))
    assert "not measured" in formatted(plan([card], one, Host(1, GIB, GIB), Limits()))


def test_a_plan_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy = ["torch", "onnxruntime", "starlette", "uvicorn", "httpx", "pynvml", "jinja2", "asyncio"]
    code = (
        "import sys\nfrom launcher.config.settings import load\n"
        "from launcher.cli.plan import run\n"
        "code = run(load(), ['24GiB'], '7GiB')\n"
        f"print(code, [m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
