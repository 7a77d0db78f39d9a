"""Frames from durations: which phone each step falls into, and where in it."""

from __future__ import annotations

import random

import pytest
import torch

from workers.models.voice.spectrum import STEPS
from workers.models.voice.timing import timing


def test_two_phones() -> None:
    placed = timing([3.0, 6.0])
    assert placed.frames == 3
    # Step s has its middle at s + 0.5; the last column is the next frame's first step.
    assert placed.phone_of.tolist() == [[0, 0, 0], [0, 1, 1], [1, 1, 1]]
    gone = placed.places[0, :, 0]
    assert gone.tolist() == pytest.approx([0.5 / 3, 1.5 / 3, 2.5 / 3])
    assert placed.places[0, :, 1].tolist() == pytest.approx((1 - gone).tolist())
    assert placed.places[..., 2].flatten().tolist() == pytest.approx(
        [float(torch.tensor(3.0).log())] * 9
    )


def test_frames_share_the_step_between_them() -> None:
    placed = timing([1.5, 2.25, 9.0, 13.3])
    assert torch.equal(placed.phone_of[:-1, STEPS], placed.phone_of[1:, 0])
    assert torch.equal(placed.places[:-1, STEPS], placed.places[1:, 0])


@pytest.mark.parametrize(
    ("end", "frames"), [(0.01, 1), (1.0, 1), (2.0, 1), (2.01, 2), (2047.0, 1024)]
)
def test_frames_cover_the_end(end: float, frames: int) -> None:
    assert timing([end]).frames == frames


def test_a_phone_without_length_gets_no_step_and_breaks_nothing() -> None:
    placed = timing([2.0, 2.0, 4.0])
    assert 1 not in placed.phone_of
    assert placed.places.isfinite().all()


@pytest.mark.parametrize("seed", range(20))
def test_phones_come_in_order_and_shares_stay_shares(seed: int) -> None:
    rng = random.Random(seed)
    ends, end = [], 0.0
    for _ in range(rng.randint(1, 80)):
        end += rng.choice([0.25, 0.5, 1.0, rng.random() * 20])
        ends.append(end)
    placed = timing(ends)
    steps = placed.phone_of[:, :STEPS].flatten()
    assert (steps.diff() >= 0).all()
    assert placed.phone_of.shape == (placed.frames, STEPS + 1)
    assert int(placed.phone_of.max()) < len(ends)
    shares = placed.places[..., :2]
    assert (shares >= 0).all()
    assert (shares <= 1).all()
    assert shares.sum(-1).allclose(torch.ones(placed.frames, STEPS + 1))
    # Each phone gets as many steps as it is long, give or take the rounding at its ends.
    counts = torch.bincount(steps, minlength=len(ends))[:-1]
    lengths = torch.tensor(ends).diff(prepend=torch.zeros(1))[:-1]
    assert ((counts - lengths).abs() < 1.01).all()
