"""Build what starts the worker of a slot: command line, environment and working directory.

It is written to a file before each start, so that the slot's process only has to read it and
`exec`.
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
    """The command that starts one worker."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    """Added to supervisord's environment."""
    folder: str
    """Its working directory: that of the configuration file."""


def launch(
    settings: Settings, device: Device, *, id: str, port: int, spec: Path, cache: Path
) -> Launch:
    """Return what starts a worker on ``device`` and ``port``. ``spec``: file of `worker_spec`."""
    on_gpu = device.is_gpu
    # A worker sees one GPU only, as its first.
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
        # ONNX Runtime would send telemetry in any model that imports it.
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
    """Replace our placeholders in ``text``; other braces stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), text)


def worker_spec(settings: Settings, cache: Path) -> dict[str, Any]:
    """Return the spec of a worker that serves a class: the model and its limits."""
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
    """Return a digest of everything that starts a worker on ``device``, except its port.

    It changes exactly when a running worker no longer matches the configuration. ``sources``:
    `sources_digest` of the model.
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
