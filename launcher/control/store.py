"""What survives the controller: the desired state and its memory, in one file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from launcher.configuration.state import StateDir, read_json, write_json
from launcher.control.desired import Desired, Memory, Record, Rollout


@dataclass(frozen=True)
class Store:
    """The file of one farm."""

    state: StateDir

    def read(self) -> tuple[Desired, Memory]:
        """What was remembered; nothing where the file is missing or makes no sense."""
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
    """The slots are observed again anyway, so what cannot be read is left out."""
    try:
        found = data["rollout"]
        return Memory(
            records={name: Record(**record) for name, record in data["records"].items()},
            rollout=Rollout(
                pending=tuple((name, int(pid)) for name, pid in found["pending"]),
                moving=tuple(found["moving"]),
                extra=found["extra"],
                no_extra=found["no_extra"],
                error=found["error"],
            ),
            proven=frozenset(data["proven"]),
            replaced=data["replaced"],
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return Memory()
