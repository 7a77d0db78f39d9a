"""The provider chain: selection, node placement as read back, and error messages."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from tests.repository import REPOSITORY
from workers.engines import onnx_runtime as engine
from workers.engines.onnx_runtime import REQUIREMENTS, OnnxEngine, Options, Profile, ProviderError

GPUS = {engine.PROVIDERS[name] for name in ("tensorrt", "cuda")}
WITH_GPU = bool(GPUS & set(onnxruntime.get_available_providers()))
without_gpu = pytest.mark.skipif(WITH_GPU, reason="this onnxruntime has GPU providers")


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """y = 2 x + 1, z = |x|: three nodes."""
    made = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "two"], ["twice"]),
            helper.make_node("Add", ["twice", "one"], ["y"]),
            helper.make_node("Abs", ["x"], ["z"]),
        ],
        "line",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "n"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "n"]) for name in ("y", "z")],
        [
            helper.make_tensor("two", TensorProto.FLOAT, [1], [2.0]),
            helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0]),
        ],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path = tmp_path / "line.onnx"
    onnx.save(model, path)
    return path


def one_line(error: pytest.ExceptionInfo[ProviderError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_cpu_runs_it(graph: Path) -> None:
    loaded = OnnxEngine(graph, Options())
    x = np.array([[1.0, -2.0, 3.0]], dtype=np.float32)
    y, z = loaded.run(x=x)
    assert y.tolist() == [[3.0, -3.0, 7.0]]
    assert z.tolist() == [[1.0, 2.0, 3.0]]
    assert loaded.inputs == ["x"]
    assert loaded.outputs == ["y", "z"]


def test_no_telemetry_is_sent(graph: Path, tmp_path: Path) -> None:
    """What ONNX Runtime keeps for its reports lies under the home; it keeps still under tests."""
    home = tmp_path / "home"
    home.mkdir()
    program = (
        "import pathlib, sys\nfrom workers.engines.onnx_runtime import OnnxEngine, Options\n"
        "OnnxEngine(pathlib.Path(sys.argv[1]), Options())"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(graph)],
        cwd=REPOSITORY,
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
        timeout=60,
        check=True,
    )
    assert list(home.iterdir()) == []


def test_node_placement_is_read_back(graph: Path) -> None:
    health = OnnxEngine(graph, Options()).health()
    assert health["provider"] == "cpu"
    # Nodes may have been fused, none may be elsewhere.
    assert set(health["nodes"]) == {"cpu"}
    assert 1 <= health["nodes"]["cpu"] <= 3
    assert "fallback" not in health


def test_input_size_may_change_between_runs(graph: Path) -> None:
    loaded = OnnxEngine(graph, Options())
    for size in (1, 7, 1, 1000):
        x = np.random.default_rng(size).standard_normal((1, size), dtype=np.float32)
        y, z = loaded.run(x=x)
        np.testing.assert_array_equal(y, x * 2 + 1)
        np.testing.assert_array_equal(z, np.abs(x))


def test_arrays_in_any_memory_order_are_accepted(graph: Path) -> None:
    x = np.arange(12, dtype=np.float32).reshape(1, 12)[:, ::-2]
    assert not x.flags["C_CONTIGUOUS"]
    y, _ = OnnxEngine(graph, Options()).run(x=x)
    np.testing.assert_array_equal(y, x * 2 + 1)


def test_output_is_not_overwritten_by_the_next_run(graph: Path) -> None:
    loaded = OnnxEngine(graph, Options())
    first = loaded.run(x=np.full((1, 4), 1.0, np.float32))[0]
    loaded.run(x=np.full((1, 4), 9.0, np.float32))
    assert first.tolist() == [[3.0] * 4]


@without_gpu
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize(
    ("require", "refused"),
    [("tensorrt", ["tensorrt"]), ("cuda", ["cuda"]), ("gpu", ["tensorrt", "cuda"])],
)
def test_required_gpu_is_missing(
    graph: Path, device: str, require: str, refused: list[str]
) -> None:
    with pytest.raises(ProviderError) as error:
        OnnxEngine(graph, Options(device=device, require=require))
    message = one_line(error)
    assert str(graph) in message
    assert f'require = "{require}"' in message
    for name in refused:
        assert f"{name}: this build of onnxruntime has no {engine.PROVIDERS[name]}" in message
    assert message.count("this build of onnxruntime") == len(refused)
    assert "onnxruntime-gpu" in message
    assert 'require = "any"' in message


@without_gpu
def test_gpu_device_requires_a_gpu_by_default(graph: Path) -> None:
    with pytest.raises(ProviderError, match='require = "gpu"'):
        OnnxEngine(graph, Options(device="cuda:0"))


@without_gpu
def test_any_falls_back_and_warns_once(graph: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        loaded = OnnxEngine(graph, Options(device="cuda:0", require="any"))
        for _ in range(3):
            loaded.run(x=np.zeros((1, 2), np.float32))
        health = loaded.health()
    assert health["provider"] == "cpu"
    tensorrt, cuda = health["fallback"]
    assert tensorrt.startswith("tensorrt: ")
    assert cuda.startswith("cuda: ")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for part in ("line.onnx", "cpu", tensorrt, cuda):
        assert part in record.getMessage()


def test_any_on_a_cpu_is_no_fallback(graph: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = OnnxEngine(graph, Options(device="cpu", require="any"))
    assert loaded.provider == "cpu"
    assert loaded.rejections == []
    assert not caplog.records


def test_a_cpu_may_be_required_beside_a_gpu(graph: Path) -> None:
    assert OnnxEngine(graph, Options(device="cuda:0", require="cpu")).provider == "cpu"


def test_unknown_requirement_lists_the_known_ones(graph: Path) -> None:
    with pytest.raises(
        ValueError, match='require must be one of any, gpu, tensorrt, cuda, cpu, got "rocm"'
    ) as error:
        OnnxEngine(graph, Options(require="rocm"))
    assert all(name in str(error.value) for name in REQUIREMENTS)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match=r"graph not found: .*gone\.onnx"):
        OnnxEngine(tmp_path / "gone.onnx", Options())


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_broken_file_is_not_reported_as_a_missing_gpu(graph: Path, share: float) -> None:
    graph.write_bytes(graph.read_bytes()[: int(graph.stat().st_size * share)])
    with pytest.raises(ProviderError) as error:
        OnnxEngine(graph, Options())
    message = one_line(error)
    assert str(graph) in message
    assert "complete" in message
    assert "onnxruntime-gpu" not in message


class Recorded:
    """Stands in for a session on a GPU machine: its providers, and the placement on record."""

    record: ClassVar[dict[str, list[str]]] = {}
    """Provider (ours) → operators of the nodes it took."""
    missing: ClassVar[set[str]] = set()
    """Providers whose library could not be loaded: they are gone without an error."""
    asked: ClassVar[list[list[tuple[str, dict[str, str]]]]] = []
    """What each attempt registered."""

    def __init__(self, *_: object, providers: list[tuple[str, dict[str, str]]], **__: object):
        self.asked.append(providers)
        self._providers = [name for name, _ in providers]

    def get_providers(self) -> list[str]:
        return [name for name in self._providers if name not in self.missing]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return [
            SimpleNamespace(
                ep_name=engine.PROVIDERS[name],
                get_nodes=lambda ops=ops: [
                    SimpleNamespace(op_type=op, name=f"/{op}_{n}", domain="")
                    for n, op in enumerate(ops)
                ],
            )
            for name, ops in self.record.items()
            if engine.PROVIDERS[name] in self._providers
        ]

    def get_inputs(self) -> list[Any]:
        return []

    get_outputs = get_inputs


@pytest.fixture
def gpu_machine(monkeypatch: pytest.MonkeyPatch) -> type[Recorded]:
    """A machine with every provider, whose sessions are played by the class it gives."""

    class Session(Recorded):
        asked: ClassVar[list[list[tuple[str, dict[str, str]]]]] = []

    every = list(engine.PROVIDERS.values())
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: every)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    return Session


def refused(graph: Path, **options: Any) -> str:
    with pytest.raises(ProviderError) as error:
        OnnxEngine(graph, Options(device="cuda:0", **options))
    return one_line(error)


def test_provider_without_nodes_is_rejected(graph: Path, gpu_machine: type[Recorded]) -> None:
    gpu_machine.record = {"cpu": ["Conv", "Mul", "Add"]}
    assert "cuda: it took none of the nodes (cpu: 3)" in refused(graph, require="cuda")


def test_provider_that_did_not_load_is_rejected(graph: Path, gpu_machine: type[Recorded]) -> None:
    gpu_machine.record = {"cpu": ["Conv"]}
    gpu_machine.missing = {engine.PROVIDERS["cuda"]}
    assert "cuda: its library did not load" in refused(graph, require="cuda")


def test_provider_that_raises_is_rejected(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("libcublas.so.12: cannot open\nshared object file")

    every = list(engine.PROVIDERS.values())
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: every)
    monkeypatch.setattr(onnxruntime, "InferenceSession", fails)
    said = "cuda: RuntimeError: libcublas.so.12: cannot open shared object file"
    assert said in refused(graph, require="cuda")


@pytest.mark.parametrize(
    ("require", "attempts"),
    [
        ("tensorrt", [["tensorrt", "cuda", "cpu"]]),
        ("cuda", [["cuda", "cpu"]]),
        ("gpu", [["tensorrt", "cuda", "cpu"], ["cuda", "cpu"]]),
        ("any", [["tensorrt", "cuda", "cpu"], ["cuda", "cpu"], ["cpu"]]),
    ],
)
def test_each_attempt_registers_the_providers_below(
    graph: Path, gpu_machine: type[Recorded], require: str, attempts: list[list[str]]
) -> None:
    """What TensorRT leaves is offered to CUDA, each with its own options."""
    gpu_machine.missing = {engine.PROVIDERS["tensorrt"], engine.PROVIDERS["cuda"]}
    options = Options(device="cuda:0", require=require)
    if require == "any":
        assert OnnxEngine(graph, options).provider == "cpu"
    else:
        refused(graph, require=require)
    expected = [
        [(engine.PROVIDERS[name], engine._provider_options(name, options)) for name in attempt]
        for attempt in attempts
    ]
    assert gpu_machine.asked == expected


def test_one_node_of_a_hundred_is_not_enough(graph: Path, gpu_machine: type[Recorded]) -> None:
    gpu_machine.record = {"cuda": ["Mul"], "cpu": ["Conv"] * 99}
    message = refused(graph, require="cuda")
    assert "cuda: the CPU runs 99 of 100 nodes that need a GPU: Conv /Conv_0," in message
    assert "and 91 more" in message


def test_what_tensorrt_leaves_to_cuda_is_accepted(graph: Path, gpu_machine: type[Recorded]) -> None:
    gpu_machine.record = {"tensorrt": ["Conv"] * 6, "cuda": ["LSTM"], "cpu": ["Shape", "Gather"]}
    health = OnnxEngine(graph, Options(device="cuda:0", require="gpu")).health()
    assert health == {
        "provider": "tensorrt",
        "nodes": {"tensorrt": 6, "cuda": 1, "cpu": 2},
        "on_cpu": ["Shape /Shape_0", "Gather /Gather_1"],
    }


def test_any_accepts_large_nodes_on_the_cpu_and_warns(
    graph: Path, gpu_machine: type[Recorded], caplog: pytest.LogCaptureFixture
) -> None:
    gpu_machine.record = {"tensorrt": ["Conv"] * 6, "cpu": ["LSTM"]}
    loaded = OnnxEngine(graph, Options(device="cuda:0", require="any"))
    assert loaded.provider == "tensorrt"
    assert "the CPU runs 1 of 7 nodes that need a GPU: LSTM /LSTM_0" in caplog.text


def test_unverifiable_gpu_is_rejected(
    graph: Path, gpu_machine: type[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older versions of ONNX Runtime keep no record."""
    monkeypatch.setattr(gpu_machine, "get_provider_graph_assignment_info", None)
    assert "does not report where nodes run" in refused(graph, require="gpu")
    assert OnnxEngine(graph, Options(device="cuda:0", require="any")).provider == "tensorrt"


def test_the_record_of_a_real_session_is_read(graph: Path) -> None:
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(str(graph), settings, providers=["CPUExecutionProvider"])
    nodes = engine._nodes(session)
    assert {(node.provider, node.op) for node in nodes} == {
        ("cpu", "Mul"),
        ("cpu", "Add"),
        ("cpu", "Abs"),
    }


def chosen(name: str, options: Options) -> dict[str, str]:
    return engine._provider_options(name, options)


def test_provider_options(tmp_path: Path) -> None:
    profiles = {
        "x": Profile((1, 1), (1, 8), (1, 48)),
        "y": Profile((1, 2, 7), (1, 8, 7), (1, 48, 7)),
    }
    options = Options("cuda:3", cache_dir=tmp_path, profiles=profiles, memory_limit=2**30)
    assert chosen("cpu", options) == {}
    cuda = chosen("cuda", options)
    assert cuda["device_id"] == "3"
    assert cuda["gpu_mem_limit"] == str(2**30)
    assert cuda["arena_extend_strategy"] == "kSameAsRequested"
    tensorrt = chosen("tensorrt", options)
    assert tensorrt["trt_engine_cache_path"] == tensorrt["trt_timing_cache_path"] == str(tmp_path)
    assert tensorrt["trt_profile_min_shapes"] == "x:1x1,y:1x2x7"
    assert tensorrt["trt_profile_opt_shapes"] == "x:1x8,y:1x8x7"
    assert tensorrt["trt_profile_max_shapes"] == "x:1x48,y:1x48x7"
    assert "trt_engine_cache_path" not in chosen("tensorrt", Options("cuda:0"))


def test_one_engine_is_built_at_a_time(tmp_path: Path) -> None:
    inside, most, lock = 0, 0, threading.Lock()

    def build() -> None:
        nonlocal inside, most
        for _ in range(20):
            with engine._build_lock(tmp_path / "cache"):
                with lock:
                    inside += 1
                    most = max(most, inside)
                with lock:
                    inside -= 1

    builders = [threading.Thread(target=build) for _ in range(4)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(60)
    assert most == 1


@pytest.mark.gpu
@pytest.mark.skipif(
    not WITH_GPU or not torch.cuda.is_available(),
    reason="no CUDA device, or this onnxruntime has no GPU providers",
)
def test_gpu_runs_the_nodes(graph: Path) -> None:
    loaded = OnnxEngine(graph, Options(device="cuda:0", require="cuda"))
    x = np.random.default_rng(1).standard_normal((1, 100), dtype=np.float32)
    np.testing.assert_allclose(loaded.run(x=x)[0], x * 2 + 1, rtol=1e-6)
    assert loaded.assignment.get("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(
    not WITH_GPU or not torch.cuda.is_available(),
    reason="no CUDA device, or this onnxruntime has no GPU providers",
)
def test_large_node_on_the_cpu_is_rejected(tmp_path: Path) -> None:
    """CUDA's provider has no kernel for Det."""
    made = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "x"], ["square"]),
            helper.make_node("Det", ["square"], ["y"], name="determinant"),
        ],
        "determinant",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
    )
    path = tmp_path / "determinant.onnx"
    onnx.save(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )
    assert "1 of 2 nodes that need a GPU: Det determinant" in refused(path, require="cuda")
    assert OnnxEngine(path, Options(device="cuda:0", require="any")).provider == "cuda"
