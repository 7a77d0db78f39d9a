"""Store measured footprints, so that a farm is measured once and not at every start.

The key holds everything that could change the footprint. Versions come from the packages' metadata,
without importing them.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from launcher.config.settings import Settings
from launcher.config.state import StateDir, read_json, set_aside, write_json
from launcher.planning.inventory import Device, Footprint

PACKAGES = ("gpufarm", "torch", "onnxruntime", "onnxruntime-gpu", "transformers", "tensorrt")
MAX_FILES = 10_000
"""Files of one folder that count for the key; further ones are ignored."""
EDGE = 1 << 20
"""Bytes hashed at both ends of a large file: weights of one shape take the same memory."""
VERSION = 1


class FootprintStore:
    """The footprints of a state directory."""

    def __init__(self, state: StateDir) -> None:
        self._path = state.footprints_file
        self._adapter = TypeAdapter(Footprint)

    def find(self, key: Mapping[str, Any]) -> Footprint | None:
        """Return the footprint stored for exactly this key; None when there is none."""
        entry = self._read().get(digest(key))
        if not isinstance(entry, dict):
            return None
        try:
            return self._adapter.validate_python(entry.get("footprint"))
        except ValidationError:
            return None

    def put(self, key: Mapping[str, Any], footprint: Footprint) -> None:
        """Store it. Raises StateError or ConfigError when it cannot be written."""
        entries = self._read()
        entries[digest(key)] = {"footprint": asdict(footprint), "key": dict(key)}
        write_json(self._path, {"version": VERSION, "footprints": entries})

    def _read(self) -> dict[str, Any]:
        data = read_json(self._path)
        if data is None:
            return {}
        entries = data.get("footprints") if isinstance(data, dict) else None
        if not isinstance(entries, dict) or data.get("version") != VERSION:
            set_aside(self._path)
            return {}
        return entries


def digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def key_of(settings: Settings, device: Device) -> dict[str, Any]:
    """Return everything that the footprint depends on, ready for JSON."""
    model = settings.model
    return {
        "model": {
            "target": model.target,
            "command": list(model.command),
            "args": model.args,
            # Hashed: it may hold a token, and the stored key is readable.
            "environment": digest(model.environment),
            "files": files_digest(settings),
        },
        "threads": settings.workers.threads,
        "requests": [
            request.model_dump(mode="json", by_alias=True)
            for request in settings.footprint.requests
        ],
        "device": {"name": device.name, "kind": device.kind, "total": _total(device)},
        "driver": device.driver,
        "python": platform.python_version(),
        "versions": versions(),
    }


def _total(device: Device) -> int | None:
    """Return a GPU's memory in bytes; None for the CPU, whose RAM does not affect a worker."""
    return None if device.kind == "cpu" else device.total


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that affect memory."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def files_digest(settings: Settings) -> str:
    """Return a hash of the model's files: its source, and those its arguments or command name."""
    total = hashlib.sha256()
    for path in sorted(set(model_files(settings))):
        total.update(str(path).encode())
        total.update(_edges(path))
    return total.hexdigest()


def model_files(settings: Settings) -> Iterator[Path]:
    """Yield the files of the class's module or package, and those that arguments name."""
    model, folder = settings.model, settings.folder
    if model.target and (source := _module_source(settings)):
        yield from _files(source)
    # The interpreter's version is in the key already.
    interpreter = Path(sys.executable).resolve()
    for text in [*model.command, *_texts(model.args)]:
        named = folder / text if 0 < len(text) < 1024 and "\0" not in text else None
        if named is not None and named.exists() and named.resolve() != interpreter:
            yield from _files(named)
    for request in settings.footprint.requests:
        if request.body_file is not None and request.body_file.is_file():
            yield request.body_file


def source_files(settings: Settings) -> Iterator[Path]:
    """Yield the model's own code: its class's module or package, and files of its command."""
    model, folder = settings.model, settings.folder
    if model.target and (source := _module_source(settings)):
        yield from (path for path in _files(source) if path.suffix == ".py")
    for text in model.command:
        named = folder / text if 0 < len(text) < 1024 and "\0" not in text else None
        if named is not None and named.suffix and named.is_file():
            yield named


def _module_source(settings: Settings) -> Path | None:
    """Return the path that a worker would import the class from, without importing it."""
    parts = settings.model.target.partition(":")[0].split(".")
    for folder in [*map(str, settings.import_path), *sys.path]:
        base = Path(folder or ".").joinpath(*parts)
        if (base / "__init__.py").is_file():
            return base
        if base.with_suffix(".py").is_file():
            return base.with_suffix(".py")
    return None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    yield from islice(_walk(path), MAX_FILES)


def _walk(top: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(top):
        folders[:] = sorted(name for name in folders if name != "__pycache__" and name[0] != ".")
        for name in sorted(names):
            if name[0] != "." and (member := Path(folder, name)).is_file():
                yield member


def _edges(path: Path) -> bytes:
    """Hash a file; of a large one, its size and both ends."""
    total = hashlib.sha256()
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            total.update(str(size).encode())
            total.update(file.read(EDGE))
            if size > 2 * EDGE:
                file.seek(-EDGE, 2)
            total.update(file.read(EDGE))
    except OSError as error:
        total.update(f"unreadable: {error.errno}".encode())
    return total.digest()
