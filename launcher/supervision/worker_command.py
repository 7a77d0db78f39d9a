"""How the worker of a slot is started: its command line, its environment, its folder.

Written down for a slot before each start, so that the process that becomes the worker needs nothing
but a file and `exec`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.config.settings import Settings
from launcher.planning.footprint_store import source_files
from launcher.planning.inventory import Device
from launcher.supervision.supervisord import python_module

WORKER_HOST = "127.0.0.1"

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "RAYON_NUM_THREADS",
)


@dataclass(frozen=True)
class Launch:
    """One worker's start."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    """Set over what the supervisor was given."""
    folder: str
    """Its working directory: where the configuration file lies."""


def launch(
    settings: Settings, device: Device, *, id: str, port: int, spec: Path, cache: Path
) -> Launch:
    """How to start a worker on ``device`` and ``port``. ``spec`` is where `worker_spec` lies."""
    on_gpu = device.is_gpu
    # A worker sees one GPU, which is then its first.
    name = "cuda:0" if on_gpu else "cpu"
    values = {
        "port": str(port),
        "host": WORKER_HOST,
        "device": name,
        "gpu": device.id if on_gpu else "",
        "id": id,
    }
    environment = {
        "CUDA_VISIBLE_DEVICES": device.id if on_gpu else "",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "PYTHONUNBUFFERED": "1",
        "GPUFARM_WORKER_ID": id,
        "GPUFARM_CACHE_DIR": str(cache),
        # A farm tells nobody what it runs. ONNX Runtime would, in any model that imports it.
        "ORT_DISABLE_TELEMETRY": "1",
        **dict.fromkeys(THREAD_VARIABLES, str(settings.workers.threads)),
        **{key: filled(text, values) for key, text in settings.model.environment.items()},
    }
    if settings.model.command:
        argv = tuple(filled(part, values) for part in settings.model.command)
    else:
        argv = python_module(
            "workers",
            *("--spec", str(spec), "--id", id, "--host", WORKER_HOST),
            *("--port", str(port), "--device", name),
        )
    return Launch(argv, environment, str(settings.folder))


def filled(text: str, values: Mapping[str, str]) -> str:
    """``text`` with our placeholders replaced; every other brace stays as it is."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), text)


def worker_spec(settings: Settings, cache: Path) -> dict[str, Any]:
    """What every worker of a class is told to serve."""
    model = settings.model
    return {
        "model": {
            "target": model.target,
            "args": model.args,
            "name": model.name,
            "aliases": list(model.aliases),
            "voice_aliases": model.voice_aliases,
        },
        "path": [str(folder) for folder in settings.import_path],
        "queue_size": settings.workers.queue_size,
        "request_timeout": settings.workers.request_timeout,
        "body_limit": settings.balancer.body_limit,
        "cache_dir": str(cache),
        "log_format": settings.logs.format,
    }


def digest(settings: Settings, device: Device, sources: str, cache: Path) -> str:
    """Return the name of what a worker on ``device`` is started with, its port aside.

    It changes exactly when a running worker is no longer what the configuration says. ``sources``
    stands for the files of the model itself.
    """
    start = launch(settings, device, id="w0", port=0, spec=Path(), cache=cache)
    spec = worker_spec(settings, cache) if settings.model.target else {}
    text = json.dumps([asdict(start), spec, settings.model.ready_url, sources], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sources_digest(settings: Settings) -> str:
    """Return a hash of the model's own source: its class's module or package, and the files that
    `model.command` names. Weights and other arguments do not count: they may change while it runs.
    """
    total = hashlib.sha256()
    for path in sorted(set(source_files(settings))):
        total.update(str(path).encode())
        try:
            total.update(path.read_bytes())
        except OSError as error:
            total.update(f"unreadable: {error.errno}".encode())
    return total.hexdigest()[:16]
