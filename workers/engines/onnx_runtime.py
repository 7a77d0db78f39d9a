"""Run ONNX graphs with an explicit provider chain: TensorRT, then CUDA, then the CPU.

ONNX Runtime falls back to the CPU silently, and ``get_providers()`` lists what is registered, not
where nodes run. So every attempt registers one provider and those below it, with explicit options,
and reads back node by node what each one runs (``placement.py``).
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Its builds send telemetry about every session, from their import on, unless this is set;
# disable_telemetry_events() comes too late for the first one.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

from workers.engines.placement import Node, counts, excess_on_cpu, rejection

log = logging.getLogger(__name__)

PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
REQUIREMENTS = ("any", "gpu", *PROVIDERS)
"""``gpu`` is TensorRT or CUDA."""

_MAX_REPORTED = 20
"""Nodes on the CPU that a health report lists."""


class ProviderError(RuntimeError):
    """No requested provider can run the graph; the message has the reason for each."""


@dataclass(frozen=True)
class Profile:
    """Shapes of one input, as TensorRT names them: the smallest, the usual and the largest."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True)
class Options:
    """How to run a graph."""

    device: str = "cpu"
    """``cpu`` or ``cuda:N``."""
    require: str | None = None
    """One of REQUIREMENTS. None stands for ``gpu`` on a GPU and ``cpu`` on a CPU.

    Where a GPU is required, the CPU may run a few small nodes at most (``placement.SMALL_OPS``,
    ``MAX_CPU_SHARE``); with ``any`` more of them are a warning.
    """
    threads: int = 1
    cache_dir: Path | None = None
    """Where TensorRT keeps engines and timings; None keeps none."""
    profiles: dict[str, Profile] = field(default_factory=dict)
    memory_limit: int | None = None
    """Bytes of the CUDA arena."""
    fp16: bool = False
    """TensorRT may compute in half precision."""

    @property
    def requirement(self) -> str:
        return self.require or ("cpu" if self.device == "cpu" else "gpu")

    @property
    def index(self) -> int:
        return int(self.device.partition(":")[2] or 0)


class OnnxEngine:
    """One loaded graph. Use it on one thread at a time."""

    def __init__(self, path: Path, options: Options) -> None:
        """Raises ProviderError where the requirement is not met, ValueError for an unknown one."""
        if options.requirement not in REQUIREMENTS:
            raise ValueError(
                f'require must be one of {", ".join(REQUIREMENTS)}, got "{options.requirement}"'
            )
        if not path.is_file():
            raise ProviderError(f"graph not found: {path}; correct the path")
        self.options = options
        self.rejections: list[str] = []
        """Why each provider before the one in use was rejected."""
        self.provider = ""
        self.assignment: dict[str, int] = {}
        """How many nodes each provider runs, read back from the session; empty where this version
        of ONNX Runtime does not report it."""
        self.on_cpu: list[str] = []
        """Nodes that the CPU runs where a GPU provider is in use."""
        for name in _attempts(options):
            found = self._attempt(path, name)
            if found is not None:
                self._session = found
                self.provider = name
                break
        else:
            rejections = "; ".join(self.rejections)
            raise ProviderError(
                f'{path}: no provider meets require = "{options.requirement}": {rejections}. '
                f"{_remedy(options)}"
            )
        if self.rejections:
            log.warning(
                "%s runs on %s after falling back: %s",
                path.name,
                self.provider,
                "; ".join(self.rejections),
            )
        self.inputs = [i.name for i in self._session.get_inputs()]
        self.outputs = [o.name for o in self._session.get_outputs()]

    def run(self, **inputs: NDArray[Any]) -> list[NDArray[Any]]:
        """Run the graph on named arrays; on a GPU by IO binding, one copy each way."""
        binding = self._session.io_binding()
        on_gpu = self.provider != "cpu"
        for name, value in inputs.items():
            array = np.ascontiguousarray(value)
            if on_gpu:
                held = onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", self.options.index)
                binding.bind_ortvalue_input(name, held)
            else:
                binding.bind_cpu_input(name, array)
        for name in self.outputs:
            if on_gpu:
                binding.bind_output(name, "cuda", self.options.index)
            else:
                binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        outputs: list[NDArray[Any]] = binding.copy_outputs_to_cpu()
        return outputs

    def health(self) -> dict[str, Any]:
        """Return what is actually in use, JSON-ready."""
        found: dict[str, Any] = {"provider": self.provider, "nodes": self.assignment}
        if self.on_cpu:
            found["on_cpu"] = self.on_cpu[:_MAX_REPORTED]
        if self.rejections:
            found["fallback"] = self.rejections
        return found

    def _attempt(self, path: Path, name: str) -> Any | None:
        """Open a session on ``name`` and those below it; None, and a rejection, on failure."""
        session = self._session_on(path, name)
        if session is None:
            return None
        nodes = _nodes(session)
        reason = _unmet_requirement(name, nodes, self.options)
        if reason is not None:
            self.rejections.append(f"{name}: {reason}")
            return None
        self.assignment = counts(nodes)
        if name != "cpu":
            self.on_cpu = [str(node) for node in nodes if node.provider == "cpu"]
            if excess := excess_on_cpu(nodes):
                log.warning("%s on %s: %s", path.name, name, excess)
        return session

    def _session_on(self, path: Path, name: str) -> Any | None:
        provider = PROVIDERS[name]
        available = onnxruntime.get_available_providers()
        if provider not in available:
            self.rejections.append(f"{name}: this build of onnxruntime has no {provider}")
            return None
        chain = [below for below in _fallback_chain(name) if PROVIDERS[below] in available]
        for below in chain:
            _load_libraries(below)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = self.options.threads
        settings.inter_op_num_threads = 1
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        try:
            with _build_lock(self.options.cache_dir if name == "tensorrt" else None):
                session = onnxruntime.InferenceSession(
                    str(path),
                    settings,
                    providers=[
                        (PROVIDERS[below], _provider_options(below, self.options))
                        for below in chain
                    ],
                    enable_fallback=0,
                )
        except Exception as error:  # whatever a provider's library raises, try the next one
            reason = " ".join(str(error).split())[:200]
            self.rejections.append(f"{name}: {type(error).__name__}: {reason}")
            return None
        # A provider that failed to load is missing here, without an error.
        if provider not in session.get_providers():
            self.rejections.append(f"{name}: its library did not load (see the log above)")
            return None
        return session


def _load_libraries(name: str) -> None:
    """Load a provider's libraries, which pip installs where the loader does not search. Libraries
    installed elsewhere need nothing."""
    if name == "cpu":
        return
    if "torch" not in sys.modules:  # it has loaded the same ones
        onnxruntime.preload_dlls()
    if name == "tensorrt":
        with contextlib.suppress(ImportError, OSError):
            importlib.import_module("tensorrt")


def _remedy(options: Options) -> str:
    if "cpu" in _attempts(options):
        return "A CPU runs any graph: check that the file is complete."
    return (
        "Install onnxruntime-gpu with its CUDA libraries, "
        'or set require = "any" to let it fall back'
    )


def _fallback_chain(name: str) -> Sequence[str]:
    """The provider and all below it, which get the nodes that it does not support."""
    names = list(PROVIDERS)
    return names[names.index(name) :]


def _unmet_requirement(name: str, nodes: Sequence[Node], options: Options) -> str | None:
    """Return why a session on ``name`` with these nodes does not meet ``options``, else None."""
    gpu_required = options.requirement not in ("any", "cpu")
    if not nodes:
        if not gpu_required:
            return None
        return (
            f"onnxruntime {onnxruntime.__version__} does not report where nodes run, so a "
            "required GPU cannot be verified; install a newer one"
        )
    return rejection(name, nodes) or (excess_on_cpu(nodes) if gpu_required else None)


def _attempts(options: Options) -> Sequence[str]:
    """The providers to try, in order."""
    required = options.requirement
    if required in PROVIDERS:
        return [required]
    if options.device == "cpu":
        return ["cpu"] if required == "any" else ["tensorrt", "cuda"]
    return ["tensorrt", "cuda", "cpu"] if required == "any" else ["tensorrt", "cuda"]


def _provider_options(name: str, options: Options) -> dict[str, str]:
    chosen: dict[str, str] = {}
    if name == "cpu":
        return chosen
    chosen["device_id"] = str(options.index)
    if name == "cuda":
        # The arena grows by the requested size, not to the next power of two, so that the measured
        # footprint holds.
        chosen["arena_extend_strategy"] = "kSameAsRequested"
        chosen["cudnn_conv_algo_search"] = "HEURISTIC"
        chosen["use_tf32"] = "0"
        if options.memory_limit:
            chosen["gpu_mem_limit"] = str(options.memory_limit)
        return chosen
    chosen["trt_fp16_enable"] = str(int(options.fp16))
    if options.cache_dir is not None:
        for key in ("trt_engine_cache", "trt_timing_cache"):
            chosen[f"{key}_enable"] = "1"
            chosen[f"{key}_path"] = str(options.cache_dir)
    for key in ("min", "opt", "max") if options.profiles else ():
        chosen[f"trt_profile_{key}_shapes"] = ",".join(
            f"{tensor}:{'x'.join(map(str, getattr(profile, key)))}"
            for tensor, profile in options.profiles.items()
        )
    return chosen


@contextlib.contextmanager
def _build_lock(folder: Path | None) -> Iterator[None]:
    """Allow one engine build at a time: concurrent ones race and crash."""
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _nodes(session: Any) -> list[Node]:
    """Return where every node runs; empty where this version of ONNX Runtime does not report it."""
    read = getattr(session, "get_provider_graph_assignment_info", None)
    if read is None:
        return []
    short = {provider: name for name, provider in PROVIDERS.items()}
    return [
        Node(short.get(part.ep_name, part.ep_name), node.op_type, node.name)
        for part in read()
        for node in part.get_nodes()
    ]
