"""Store the desired state and the controller's memory in one file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from launcher.config.state import StateDir, read_json, write_json
from launcher.controller.model import Desired, Memory

MEMORY = TypeAdapter(Memory)


@dataclass(frozen=True)
class Store:
    """The file of one farm."""

    state: StateDir

    def read(self) -> tuple[Desired, Memory]:
        """Read both; defaults if the file is missing or invalid."""
        data = read_json(self.state.desired_file)
        if not isinstance(data, dict):
            return Desired(), Memory()
        return _desired(data), _memory(data.get("memory"))

    def write(self, desired: Desired, memory: Memory) -> None:
        write_json(
            self.state.desired_file,
            {
                "count": desired.count,
                "drained": sorted(desired.drained),
                "memory": {**asdict(memory), "proven": sorted(memory.proven)},
            },
        )


def _desired(data: dict[str, Any]) -> Desired:
    count, drained = data.get("count"), data.get("drained")
    is_count = isinstance(count, int) and not isinstance(count, bool) and count >= 0
    names = drained if isinstance(drained, list) else []
    return Desired(
        count if is_count else None,
        frozenset(name for name in names if isinstance(name, str)),
    )


def _memory(data: Any) -> Memory:
    """Read the memory; an invalid one is dropped as a whole, because one wrong value would fail
    every round, and the slots are observed again anyway."""
    try:
        return MEMORY.validate_json(json.dumps(data), strict=True)
    except (ValidationError, ValueError):
        return Memory()
