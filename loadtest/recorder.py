"""Brings every process's samples into one CSV: a worker sends its own along with its statistics."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.samples import Sample, Writer, from_row

_KEY = "gpufarm_samples"


@dataclass(frozen=True)
class Step:
    start: float
    """Unix seconds."""
    users: int
    seconds: float
    """How long it is to last; 0 is "until stopped"."""


class Steps:
    """Which number of users the run asked for, and since when."""

    def __init__(self) -> None:
        self._steps: list[Step] = []
        self._open = False

    @property
    def users(self) -> int:
        """What is asked for now; 0 between two runs."""
        return self._steps[-1].users if self._open else 0

    def begin(self, step: Step) -> None:
        self._steps.append(step)
        self._open = True

    def end(self) -> None:
        self._open = False

    def at(self, moment: float) -> Step:
        """The step of a moment; the first one for what comes before (clocks differ a little)."""
        index = bisect_right(self._steps, moment, key=lambda step: step.start)
        return self._steps[max(index - 1, 0)] if self._steps else Step(moment, 0, 0.0)


class Recorder:
    """Writes samples to a file, or keeps them until they are sent to the master.

    Without a file and without a master, samples are dropped.
    """

    def __init__(self, steps: Steps, file: Path | None, sends: bool) -> None:
        """``sends``: this process is a worker of a distributed run. Raises OSError."""
        self._steps = steps
        self._kept: list[list[Any]] = []
        self._sends = sends
        self._file = None
        self._writer = None
        if file is not None and not sends:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = file.open("w", newline="", encoding="utf-8", buffering=1)
            self._writer = Writer(self._file)

    def add(self, sample: Sample) -> None:
        if self._sends:
            self._kept.append(sample.row())
        elif self._writer is not None:
            step = self._steps.at(sample.scheduled)
            self._writer.write(sample.at_step(step.users, step.start, step.seconds))

    def send(self, data: dict[str, Any]) -> None:
        """On a worker: put what is kept into its report."""
        data[_KEY], self._kept = self._kept, []

    def receive(self, data: dict[str, Any]) -> None:
        """On the master: write what a worker's report brings."""
        for row in data.get(_KEY, ()):
            self.add(from_row(row))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._writer = None
