"""What survives the controller: wishes and memory, in one file."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from launcher.configuration.state import StateDir, read_json, write_json
from launcher.control.reconcile import Desired, Memory, Record, Roll
from launcher.processes.farm import Farm


@dataclass(frozen=True)
class Store:
    """The file of one farm."""

    state: StateDir

    def read(self, farm: Farm) -> tuple[Desired, Memory]:
        data = read_json(self.state.desired_file)
        if not isinstance(data, dict):
            return Desired(farm.plan.count), Memory()
        try:
            desired = Desired(int(data["count"]), frozenset(data["drained"]))
            if "memory" not in data:
                return desired, Memory()
            memory = data["memory"]
            roll = memory["roll"]
            return (
                desired,
                Memory(
                    records={name: Record(**record) for name, record in memory["records"].items()},
                    roll=Roll(
                        tuple((name, int(pid)) for name, pid in roll["pending"]),
                        roll["extra"],
                        roll["error"],
                    ),
                    replaced=memory["replaced"],
                ),
            )
        except (KeyError, TypeError, ValueError):
            # Written by another version: the count is what matters, the rest is seen again.
            count = data.get("count")
            return Desired(count if isinstance(count, int) else farm.plan.count), Memory()

    def write(self, desired: Desired, memory: Memory) -> None:
        data = {
            "count": desired.count,
            "drained": sorted(desired.drained),
            "memory": asdict(memory),
        }
        write_json(self.state.desired_file, data)
