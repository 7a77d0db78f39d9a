"""How a worker is started: what the configuration says, filled in, and nothing inherited."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.config.settings import Settings, load
from launcher.config.state import StateDir, write_json
from launcher.planning.inventory import Device, Footprint, Host
from launcher.planning.plan import Limits, plan
from launcher.supervision.farm import write_launch
from launcher.supervision.worker_command import digest, filled, launch, sources_digest, worker_spec
from tests.launcher.supervision.farm_records import farm_of

GPU = Device(id="GPU-1234", name="A card", kind="gpu", total=24 * 2**30, free=24 * 2**30)
CPU = Device(id="cpu", name="CPU", kind="cpu", total=2**34, free=2**34)


def settings(tmp_path: Path, text: str = "", **overrides: Any) -> Settings:
    """Overrides are dotted, with two underscores for a dot."""
    file = tmp_path / "gpufarm.toml"
    file.write_text(text)
    dotted = {name.replace("__", "."): value for name, value in overrides.items()}
    return load(file, dotted, {"HOME": str(tmp_path)})


COMMAND = """
[model]
command = ["python", "s.py", "--listen", "{host}:{port}", "--d={device}", '{"a": "{x}"}', "{gpu}"]
environment = { NAME = "worker {id}", OMP_NUM_THREADS = "7" }
[workers]
threads = 3
[footprint]
bytes = "1GiB"
"""


def test_placeholders_of_an_external_command_are_replaced(tmp_path: Path) -> None:
    given = settings(tmp_path, COMMAND)
    on_gpu = launch(given, GPU, id="w2", port=21002, spec=tmp_path, cache=tmp_path / "c")
    assert on_gpu.argv == (
        *("python", "s.py", "--listen", "127.0.0.1:21002", "--d=cuda:0"),
        *('{"a": "{x}"}', "GPU-1234"),
    )
    assert on_gpu.environment["CUDA_VISIBLE_DEVICES"] == "GPU-1234"
    assert on_gpu.environment["NAME"] == "worker w2"
    assert on_gpu.environment["OMP_NUM_THREADS"] == "7", "the user's word is last"
    assert on_gpu.environment["MKL_NUM_THREADS"] == "3"
    assert on_gpu.environment["ORT_DISABLE_TELEMETRY"] == "1", "no telemetry is sent"
    assert on_gpu.folder == str(tmp_path)
    on_cpu = launch(given, CPU, id="w2", port=1, spec=tmp_path, cache=tmp_path)
    assert on_cpu.environment["CUDA_VISIBLE_DEVICES"] == ""
    assert "--d=cpu" in on_cpu.argv


def test_a_class_is_started_by_this_interpreter(tmp_path: Path) -> None:
    begin = launch(
        settings(tmp_path), CPU, id="w1", port=21001, spec=tmp_path / "s", cache=tmp_path
    )
    assert begin.argv[:4] == (sys.executable, "-P", "-m", "workers")
    pairs = dict(zip(begin.argv[4::2], begin.argv[5::2], strict=True))
    assert pairs == {
        "--spec": str(tmp_path / "s"),
        "--id": "w1",
        "--host": "127.0.0.1",
        "--port": "21001",
        "--device": "cpu",
    }


def test_the_spec_is_json_and_names_the_files_folder(tmp_path: Path) -> None:
    text = '[model]\ntarget = "a.b:C"\nargs = { size = 3 }\nvoice_aliases = { alloy = "anna" }'
    text += '\n[workers]\npath = ["more"]'
    spec = worker_spec(settings(tmp_path, text), tmp_path / "cache")
    assert json.loads(json.dumps(spec)) == spec
    assert spec["model"]["voice_aliases"] == {"alloy": "anna"}
    assert spec["path"] == [str(tmp_path), str(tmp_path / "more")]
    assert spec["model"]["args"] == {"size": 3}


def test_the_digest_changes_with_what_is_served_and_with_nothing_else(tmp_path: Path) -> None:
    def digested(text: str = "", device: Device = CPU, **changes: Any) -> str:
        return digest(settings(tmp_path, text, **changes), device, "sources", tmp_path)

    base = digested()
    assert digested(port=9000) == base
    assert digested(workers__count=3) == base
    assert digested(workers__max=9) == base
    assert digested(logs__backups=9) == base
    assert digested(device=GPU) != base
    assert digested(device=GPU) != digested(device=replace(GPU, id="GPU-5678"))
    assert digested(device=GPU) == digested(device=replace(GPU, free=1, name="the same card"))
    changes: list[dict[str, Any]] = [
        {"workers__queue_size": 3},
        {"workers__threads": 2},
        {"model__name": "other"},
        {"workers__request_timeout": 33.0},
        {"logs__format": "json"},
    ]
    for changed in changes:
        assert digested(**changed) != base
    assert digest(settings(tmp_path), CPU, "other sources", tmp_path) != base
    external = digested(COMMAND)
    assert external != base
    assert digested(COMMAND, workers__queue_size=3) == external


def test_the_sources_digest_follows_the_models_own_files_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "package" / "deep").mkdir(parents=True)
    for name in ("__init__", "model", "deep/part"):
        (tmp_path / "package" / f"{name}.py").write_text("A = 1")
    (tmp_path / "other.py").write_text("A = 1")
    for target, files in [
        ("package.model:M", ["package/model.py"]),
        ("package:M", ["package/__init__.py", "package/deep/part.py"]),
    ]:
        given = settings(tmp_path, model__target=target)
        for name in files:
            before = sources_digest(given)
            assert sources_digest(given) == before
            (tmp_path / name).write_text(f"{before!r}")
            assert sources_digest(given) != before, name
        before = sources_digest(given)
        (tmp_path / "other.py").write_text(f"{target!r}")
        (tmp_path / "package" / "weights.bin").write_text(target)
        assert sources_digest(given) == before


def test_the_sources_of_an_external_server_are_the_files_that_its_command_names(
    tmp_path: Path,
) -> None:
    (tmp_path / "s.py").write_text("1")
    given = settings(tmp_path, COMMAND)
    before = sources_digest(given)
    (tmp_path / "s.py").write_text("2")
    assert sources_digest(given) != before


def test_only_our_placeholders_are_filled() -> None:
    values = {"port": "1", "id": "w1"}
    assert filled("{port} {id} {other} ${HOME} {} {port", values) == "1 w1 {other} ${HOME} {} {port"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory whose first slot runs a command that tells its environment."""
    code = "import json,os,sys; print(json.dumps([dict(os.environ), os.getcwd(), sys.argv]))"
    given = settings(tmp_path)
    model = given.model.model_copy(
        update={"target": "", "command": (sys.executable, "-c", code, "{port}")}
    )
    given = given.model_copy(update={"model": model})
    planned = plan([CPU], Footprint.given(2**20), Host(cores=1), Limits(count=1, max=2))
    farm = farm_of(given.model_copy(update={"state_dir": tmp_path}), planned)
    StateDir(tmp_path).slots.mkdir()
    for planned_slot in farm.plan.slots:
        write_launch(farm, farm.current, planned_slot)
    return tmp_path


def slot(state: Path, number: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "launcher.supervision.slot",
            "--state",
            str(state),
            "--slot",
            number,
        ],
        env={**os.environ, "GPUFARM_FARM": "/here"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_a_slot_becomes_its_worker(state: Path) -> None:
    environment, folder, argv = json.loads(slot(state, "2").stdout)
    assert argv == ["-c", "21002"]
    assert folder == str(state)
    assert environment["GPUFARM_WORKER_ID"] == "w2"
    assert environment["GPUFARM_CACHE_DIR"] == str(state / "cache")
    assert environment["GPUFARM_FARM"] == "/here", "leftovers are found by it"


def test_a_slot_that_is_not_planned_is_3_and_one_line(state: Path) -> None:
    done = slot(state, "9")
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1
    assert "gpufarm up" in done.stderr


@pytest.mark.parametrize("key", ["A=B", "NUL\0"])
def test_what_no_process_can_be_given_is_3_and_one_line(state: Path, key: str) -> None:
    made = json.loads((state / "slots" / "w1.json").read_text())
    made["environment"][key] = "x"
    write_json(state / "slots" / "w1.json", made)
    done = slot(state, "1")
    assert done.returncode == 3, "it would fail the same way again"
    assert len(done.stderr.splitlines()) == 1
    assert "model.environment" in done.stderr
