"""Capture one step of a batch-1 network in CUDA graphs and replay it; a CPU runs the step eagerly.

A captured graph reads and writes fixed addresses, so everything that changes between steps is in
static buffers that the step's owner keeps, and nothing in the step may wait for the device.
A graph and its buffers serve one request at a time, on the thread that captured them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

Step = Callable[[int], None]
"""Runs one step for a bucket: the length of the prefix that attention reads."""


class GraphEngine:
    """Replays ``step`` for the smallest bucket that holds the position.

    ``buckets``: ascending prefix lengths; one graph is captured for each, all in one memory pool.
    """

    def __init__(self, step: Step, buckets: Sequence[int], device: torch.device) -> None:
        if list(buckets) != sorted(set(buckets)) or not buckets:
            raise ValueError(f"buckets must ascend, got {list(buckets)}")
        self.step = step
        self.buckets = list(buckets)
        self.device = device
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    @property
    def kind(self) -> str:
        """``cuda-graph`` or ``eager``: what actually runs."""
        return "cuda-graph" if self._graphs else "eager"

    def bucket(self, position: int) -> int:
        """Return the bucket for a 0-based position. Raises ValueError past the last one."""
        for size in self.buckets:
            if position < size:
                return size
        raise ValueError(
            f"position must be less than the longest bucket, {self.buckets[-1]}, got {position}"
        )

    def warm_up(self, rounds: int = 3) -> None:
        """Run every bucket eagerly, which loads kernels and allocates workspaces.

        On CUDA this happens on a side stream, as the capture requires.
        """
        if self.device.type != "cuda":
            for size in self.buckets:
                self.step(size)
            return
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for size in self.buckets:
                for _ in range(rounds):
                    self.step(size)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)

    def capture(self) -> None:
        """Capture a graph for every bucket into one private pool; nothing to do on a CPU."""
        if self.device.type != "cuda":
            return
        pool = torch.cuda.graph_pool_handle()
        with _no_collection():
            # The longest first: the shorter ones then fit into the memory it has reserved.
            for size in reversed(self.buckets):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    self.step(size)
                self._graphs[size] = graph
        torch.cuda.synchronize(self.device)

    def run(self, position: int) -> None:
        """Run one step at ``position``, without waiting for the device."""
        size = self.bucket(position)
        graph = self._graphs.get(size)
        if graph is None:
            self.step(size)
        else:
            graph.replay()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disable garbage collection: destroying an older engine's graphs would break a capture."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
