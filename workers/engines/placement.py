"""Decide whether a graph's nodes run on the requested provider. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

SMALL_OPS = frozenset(
    {
        # shapes and indexing
        *("Shape", "Size", "Constant", "ConstantOfShape", "Identity", "Range", "NonZero"),
        *("Gather", "Slice", "Concat", "Split", "Squeeze", "Unsqueeze", "Reshape", "Expand"),
        *("Cast", "Tile", "ScatterND"),
        # arithmetic on sizes and flags
        *("Add", "Sub", "Mul", "Div", "Mod", "Neg", "Abs", "Floor", "Ceil", "Min", "Max"),
        *("ReduceProd", "ReduceMin", "ReduceMax", "Equal", "Less", "LessOrEqual", "Greater"),
        *("GreaterOrEqual", "Not", "And", "Or", "Where"),
    }
)
"""Operators that a CPU may run beside a GPU.

CUDA's provider leaves the arithmetic of shapes to the CPU on purpose, since a copy to the GPU and
back costs more. The record has no tensor sizes, so the share below bounds these as well.
"""

MAX_CPU_SHARE = 0.25
"""Largest share of all nodes, small ones only, that the CPU may run where a GPU is required."""

MIN_OWN_SHARE = 0.5
"""Smallest share of the nodes on GPU providers that the requested one has to run. TensorRT with
more nodes on CUDA is slower than CUDA alone: each border between the two ends an engine."""

_MAX_NAMES = 8


@dataclass(frozen=True)
class Node:
    """A node of the graph before providers fused it with others."""

    provider: str
    """``tensorrt``, ``cuda``, ``cpu``, or ONNX Runtime's name of another one."""
    op: str
    name: str = ""

    @property
    def is_small(self) -> bool:
        return self.op in SMALL_OPS

    def __str__(self) -> str:
        return f"{self.op} {self.name}".strip()


def counts(nodes: Sequence[Node]) -> dict[str, int]:
    """Count the nodes of each provider."""
    return dict(Counter(node.provider for node in nodes))


def rejection(requested: str, nodes: Sequence[Node]) -> str | None:
    """Return why ``requested`` does not run enough of the graph; None where it does."""
    own = sum(node.provider == requested for node in nodes)
    if not own:
        return f"it took none of the nodes ({_format_counts(nodes)})"
    others = sum(node.provider not in (requested, "cpu") for node in nodes)
    if requested != "cpu" and own < MIN_OWN_SHARE * (own + others):
        return (
            f"it took {own} of the {own + others} nodes that a GPU runs ({_format_counts(nodes)})"
        )
    return None


def excess_on_cpu(nodes: Sequence[Node]) -> str | None:
    """Describe what the CPU runs of a graph for a GPU, beyond MAX_CPU_SHARE of small nodes; None
    where it is within that tolerance."""
    on_cpu = [node for node in nodes if node.provider == "cpu"]
    large = [node for node in on_cpu if not node.is_small]
    if large:
        names = _format_names(large)
        return f"the CPU runs {len(large)} of {len(nodes)} nodes that need a GPU: {names}"
    if len(on_cpu) > MAX_CPU_SHARE * len(nodes):
        return (
            f"the CPU runs {len(on_cpu)} of {len(nodes)} nodes, more than the {MAX_CPU_SHARE:.0%} "
            f"allowed for small ones: {_format_names(on_cpu)}"
        )
    return None


def _format_counts(nodes: Sequence[Node]) -> str:
    return ", ".join(f"{provider}: {count}" for provider, count in counts(nodes).items())


def _format_names(nodes: Sequence[Node]) -> str:
    rest = len(nodes) - _MAX_NAMES
    named = ", ".join(map(str, nodes[:_MAX_NAMES]))
    return f"{named} and {rest} more" if rest > 0 else named
