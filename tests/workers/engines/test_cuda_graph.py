"""Buckets, and the step that runs eagerly on a CPU and from captured graphs on a GPU."""

from __future__ import annotations

import pytest
import torch

from workers.engines.cuda_graph import GraphEngine

CPU = torch.device("cpu")


def recorder(buckets: list[int]) -> tuple[GraphEngine, list[int]]:
    ran: list[int] = []
    return GraphEngine(ran.append, buckets, CPU), ran


@pytest.mark.parametrize(
    ("position", "bucket"), [(0, 4), (3, 4), (4, 16), (15, 16), (16, 64), (63, 64)]
)
def test_the_smallest_bucket_that_holds_the_position(position: int, bucket: int) -> None:
    engine, ran = recorder([4, 16, 64])
    assert engine.bucket(position) == bucket
    engine.run(position)
    assert ran == [bucket]


def test_position_past_the_last_bucket_is_rejected() -> None:
    engine, ran = recorder([4, 16])
    with pytest.raises(
        ValueError, match="position must be less than the longest bucket, 16, got 16"
    ):
        engine.run(16)
    assert ran == []


@pytest.mark.parametrize("buckets", [[], [2, 1], [1, 1]])
def test_buckets_ascend(buckets: list[int]) -> None:
    with pytest.raises(ValueError, match="buckets must ascend"):
        recorder(buckets)


def test_a_cpu_runs_eagerly_and_captures_nothing() -> None:
    engine, ran = recorder([4, 16])
    engine.warm_up()
    assert sorted(ran) == [4, 16]
    engine.capture()
    assert sorted(ran) == [4, 16]
    assert engine.kind == "eager"


def test_the_engine_does_not_keep_the_callers_list() -> None:
    buckets = [4, 16]
    engine, _ = recorder(buckets)
    buckets.append(2)
    assert engine.buckets == [4, 16]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_replays_what_it_captured() -> None:
    device = torch.device("cuda:0")
    total, position = (
        torch.zeros(64, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )

    def step(bucket: int) -> None:
        total[:bucket] += 1
        position.add_(1)

    engine = GraphEngine(step, [16, 64], device)
    engine.warm_up()
    engine.capture()
    assert engine.kind == "cuda-graph"
    total.zero_()
    position.zero_()
    for at in (0, 15, 16):
        engine.run(at)
    assert total.tolist() == [3.0] * 16 + [1.0] * 48
    assert int(position) == 3
