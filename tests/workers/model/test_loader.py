"""Loading a model by its name, and the one-line errors."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.repository import REPOSITORY
from tests.workers.harness import WorkerProcess, eventually
from workers.errors import LoadError
from workers.model.loader import LoadedModel, load
from workers.model.spec import Spec

FAULTY = "tests.workers.models.faulty_start"


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def load_it(executor: ThreadPoolExecutor, target: str, **args: Any) -> LoadedModel:
    return load(Spec(target=target, args=args), "cpu", executor)


def test_a_model_is_set_up_on_the_device_thread(executor: ThreadPoolExecutor) -> None:
    loaded = load_it(executor, "tests.workers.models.plain:Echo")
    thread = executor.submit(lambda: __import__("threading").current_thread().name).result()
    assert loaded.report["threads"] == [thread]
    assert loaded.predict("device", events=False).body == b'{"device":"cpu"}'
    assert loaded.predicts
    assert not loaded.speaks
    assert set(loaded.startup_seconds) == {"load", "warm_up"}


def test_speech_model_declares_its_rate_and_voices(executor: ThreadPoolExecutor) -> None:
    loaded = load_it(executor, "tests.workers.models.speech:Hum", sample_rate=8000)
    assert loaded.speaks
    assert (loaded.sample_rate, loaded.voices) == (8000, ["low", "high"])


def test_class_in_a_configured_folder_is_found(
    executor: ThreadPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", __import__("sys").path[:])
    (tmp_path / "beside_the_file.py").write_text(
        "class Mine:\n"
        "    def __init__(self, factor=1):\n        self.factor = factor\n"
        "    def setup(self, device):\n        pass\n"
        "    def predict(self, request):\n        return request * self.factor\n"
    )
    spec = Spec(target="beside_the_file:Mine", args={"factor": 3}, path=(tmp_path,))
    assert load(spec, "cpu", executor).predict(2, events=False).body == b"6"


@pytest.mark.parametrize(
    ("target", "args", "words"),
    [
        ("plain", {}, ["is not a class name", "package.module:Class"]),
        ("a b:C", {}, ["is not a class name"]),
        ("no_such_module:Model", {}, ["no module named no_such_module", "workers.path"]),
        ("tests.workers.models.none:Model", {}, ["no module named tests.workers.models.none"]),
        (
            "tests.workers.models.broken_import:M",
            {},
            ["needs the module a_module_that_does", "install it"],
        ),
        ("tests.workers.models.plain:Ecko", {}, ["has no Ecko", "did you mean Echo?"]),
        (
            "tests.workers.models.plain:Zzzz",
            {},
            ["its classes: Answers, Async, AsyncStream, Counting"],
        ),
        (f"{FAULTY}:NOT_A_CLASS", {}, ["is not a class but int"]),
        (f"{FAULTY}:Arguments", {}, ["missing a required argument: 'size'", "it takes (size"]),
        (f"{FAULTY}:Arguments", {"size": 1, "z": 2}, ["unexpected keyword argument 'z'"]),
        (f"{FAULTY}:NoSetup", {}, ["has no setup(device)"]),
        (f"{FAULTY}:NoPredict", {}, ["neither predict(request) nor speak(request)"]),
        (
            f"{FAULTY}:PredictWithoutRequest",
            {},
            ["PredictWithoutRequest.predict() cannot be called as predict(request)"],
        ),
        (
            f"{FAULTY}:SetupWithoutDevice",
            {},
            ["SetupWithoutDevice.setup() cannot be called as setup(device)", "too many"],
        ),
        (
            f"{FAULTY}:SpeakWithTwo",
            {},
            ["speak(text, voice) cannot", "as speak(request)", "missing a required argument"],
        ),
        (f"{FAULTY}:HealthWithArgument", {}, ["cannot be called as health()", "'verbose'"]),
        (f"{FAULTY}:PredictIsData", {}, ["predict is not a method but int: define predict(r"]),
        (f"{FAULTY}:AsyncSetupFails", {}, ['setup("cpu") failed: FileNotFoundError', "weights"]),
        (f"{FAULTY}:SetupFails", {}, ['setup("cpu") failed: FileNotFoundError', "faulty_start.py"]),
        (f"{FAULTY}:WarmUpFails", {}, ["warm_up() failed: RuntimeError: no kernel image"]),
        (f"{FAULTY}:Exits", {}, ["setup", "SystemExit"]),
        (
            f"{FAULTY}:HealthFails",
            {},
            ["health() failed: TypeError", "must return a dict, got list"],
        ),
        (f"{FAULTY}:LongestFails", {}, ["longest_request() failed: TypeError", "got str"]),
        (f"{FAULTY}:NoVoices", {}, ["voices must be a list with at least one name, got []"]),
        (
            "tests.workers.models.speech:Hum",
            {"sample_rate": 16000.5},
            ["sample_rate must be an integer", "got 16000.5"],
        ),
    ],
)
def test_load_errors_are_one_line(
    executor: ThreadPoolExecutor, target: str, args: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(LoadError) as error:
        load_it(executor, target, **args)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


OWN = ("workers", "launcher", "balancer", "loadtest")
MODEL = "class Mine:\n    def setup(self, device): pass\n    def predict(self, request): return 1\n"


@pytest.mark.parametrize("package", OWN)
@pytest.mark.parametrize("shape", ["folder", "module"])
def test_module_hidden_by_a_gpufarm_package(tmp_path: Path, package: str, shape: str) -> None:
    """In a real worker: a test's own process has other packages imported."""
    if shape == "folder":
        file, target = tmp_path / package / "mymodel.py", f"{package}.mymodel:Mine"
    else:
        file, target = tmp_path / f"{package}.py", f"{package}:Mine"
    file.parent.mkdir(exist_ok=True)
    file.write_text(MODEL)
    worker = WorkerProcess(tmp_path, target, spec={"path": [str(tmp_path), str(REPOSITORY)]})
    try:
        if shape == "module" and package != "workers":
            eventually(lambda: "ready url=" in worker.log, "a worker, which has no other use of it")
            return
        assert worker.wait() == 3
        (line,) = worker.lines
    finally:
        worker.__exit__()
    beside = file if shape == "module" else file.parent
    assert f'{beside} has the name of gpufarm\'s own package "{package}"' in line
    assert f"no {'Mine' if shape == 'module' else 'mymodel'}; rename it" in line


def test_missing_submodule_of_a_gpufarm_package(
    executor: ThreadPoolExecutor,
) -> None:
    with pytest.raises(LoadError, match=r"no module named workers\.nothing"):
        load(Spec(target="workers.nothing:Mine", path=(REPOSITORY,)), "cpu", executor)


def test_missing_folder_is_named(executor: ThreadPoolExecutor, tmp_path: Path) -> None:
    spec = Spec(target="a:B", path=(tmp_path / "none",))
    with pytest.raises(LoadError, match="is not a folder"):
        load(spec, "cpu", executor)
