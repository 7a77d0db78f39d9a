"""The job of one section, and its outcome."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Rows = Iterator[Row]
"""Results of a section as they are measured; each row names its ``table``."""
GIB = 1 << 30


class BenchmarkError(Exception):
    """A measurement failed or could not be made."""


@dataclass(frozen=True)
class Scale:
    """Sizes of the measurements."""

    frames: int
    """Frames of the sentence that is decoded."""
    rounds: int
    """Rounds of each mode, alternating."""
    copied: int
    """Bytes of the block that is copied to measure the bandwidth."""
    copies: int
    workers: tuple[int, ...]
    window: float
    """Seconds of closed loop for each number of workers."""
    rest: float
    """Seconds for which memory is sampled while the workers are idle."""


FULL = Scale(240, 6, 2 * GIB, 20, (1, 2, 3, 4, 6, 8), 2.5, 2.0)
QUICK = Scale(12, 2, GIB // 64, 3, (1, 2), 0.5, 0.3)


@dataclass(frozen=True)
class Job:
    device: str
    """``cuda:0`` or ``cpu``."""
    weights: str
    """The voice's folder."""
    logs: str
    """Folder of the worker processes' logs."""
    quick: bool = False
    models: tuple[str, ...] = ("voice",)
    """See ``subjects.load``."""
    mps: bool = False
    """Workers must be clients of the MPS daemon that the environment names."""
    uuid: str = ""
    """The device's UUID by NVML; empty on a CPU."""

    @property
    def scale(self) -> Scale:
        return QUICK if self.quick else FULL

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def log(self, name: str) -> Path:
        return Path(self.logs) / f"{name}.log"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        values = json.loads(text)
        return cls(**{**values, "models": tuple(values["models"])})


@dataclass
class Outcome:
    name: str
    reason: str = ""
    """Why the section failed; empty if it passed."""
    seconds: float = 0.0
    deadline: float = 0.0
    rows: list[Row] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.reason
