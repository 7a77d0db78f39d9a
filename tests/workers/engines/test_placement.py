"""The decision about where nodes may run, from recorded placements."""

from __future__ import annotations

import pytest

from workers.engines.placement import Node, counts, excess_on_cpu, rejection


def nodes(**placed: list[str]) -> list[Node]:
    return [Node(provider, op, f"/{op}") for provider, ops in placed.items() for op in ops]


@pytest.mark.parametrize(
    ("placed", "expected"),
    [
        ({"cuda": ["Conv"] * 9, "cpu": []}, None),
        ({"cuda": ["Conv"] * 9, "cpu": ["Shape", "Gather", "Mul"]}, None),
        (
            {"cuda": ["Conv"] * 9, "cpu": ["LSTM"]},
            "the CPU runs 1 of 10 nodes that need a GPU: LSTM /LSTM",
        ),
        (
            {"cuda": ["Conv"] * 2, "cpu": ["Shape", "Gather"]},
            "the CPU runs 2 of 4 nodes, more than the 25% allowed for small ones: "
            "Shape /Shape, Gather /Gather",
        ),
        (
            {"cuda": ["Conv"], "cpu": ["Conv"] * 99},
            "the CPU runs 99 of 100 nodes that need a GPU: "
            + ", ".join(["Conv /Conv"] * 8)
            + " and 91 more",
        ),
    ],
)
def test_nodes_allowed_on_the_cpu_beside_a_gpu(
    placed: dict[str, list[str]], expected: str | None
) -> None:
    assert excess_on_cpu(nodes(**placed)) == expected


@pytest.mark.parametrize(
    ("asked", "placed", "expected"),
    [
        ("cpu", {"cpu": ["Conv"]}, None),
        ("cuda", {"cuda": ["Conv"], "cpu": ["Conv"] * 99}, None),
        ("cuda", {"cpu": ["Conv"] * 3}, "it took none of the nodes (cpu: 3)"),
        ("tensorrt", {"tensorrt": ["Conv"], "cuda": ["Conv"]}, None),
        (
            "tensorrt",
            {"tensorrt": ["Conv"], "cuda": ["Conv"] * 2, "cpu": ["Shape"]},
            "it took 1 of the 3 nodes that a GPU runs (tensorrt: 1, cuda: 2, cpu: 1)",
        ),
    ],
)
def test_minimum_share_of_the_requested_provider(
    asked: str, placed: dict[str, list[str]], expected: str | None
) -> None:
    assert rejection(asked, nodes(**placed)) == expected


def test_nodes_are_counted_by_provider() -> None:
    assert counts(nodes(cuda=["Conv", "Add"], cpu=["Shape"])) == {"cuda": 2, "cpu": 1}
