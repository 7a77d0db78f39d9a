"""Choosing codes: what noise, temperature, top-p and the repetition penalty do."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.repository import REPOSITORY
from workers.models.voice.sampling import (
    MIN_TEMPERATURE,
    PENALTY_WINDOW,
    choose,
    draw_noise,
    penalise,
)

SIZE = 64


def scores_of(seed: int, size: int = SIZE) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def pick(scores: Tensor, noise: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> int:
    code = choose(scores, noise, torch.tensor(temperature), torch.tensor(top_p))
    assert code.shape == (1,)
    assert code.dtype == torch.int64
    return int(code)


def test_noise_is_the_same_for_a_seed_in_every_process() -> None:
    program = (
        "from workers.models.voice.sampling import draw_noise;"
        "print(draw_noise(5, (3, 7, 16)).numpy().tobytes().hex())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == draw_noise(5, (3, 7, 16)).numpy().tobytes().hex()


def test_noise_differs_between_seeds_and_is_never_zero() -> None:
    first, second = draw_noise(1, (100, SIZE)), draw_noise(2, (100, SIZE))
    assert not torch.equal(first, second)
    assert float(first.min()) > 0
    assert float(first.mean()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_every_seed_draws(seed: int) -> None:
    assert draw_noise(seed, (2, 2)).isfinite().all()


def test_cold_is_the_largest_score_whatever_the_noise() -> None:
    for seed in range(50):
        scores = scores_of(seed)
        assert pick(scores, draw_noise(seed, (SIZE,)), MIN_TEMPERATURE) == int(scores.argmax())


def test_cold_is_the_largest_score_however_near_the_next_is() -> None:
    scores = torch.zeros(SIZE)
    scores[7] = 1e-6
    noise = torch.full((SIZE,), 1e-10)
    noise[7] = 100.0
    assert pick(scores, noise, MIN_TEMPERATURE) == 7


def test_codes_come_as_often_as_their_chances_say() -> None:
    chances = torch.tensor([0.5, 0.25, 0.125, 0.125])
    drawn = 4000
    noise = draw_noise(3, (drawn, 4))
    counts = torch.bincount(torch.tensor([pick(chances.log(), row) for row in noise]), minlength=4)
    assert (counts / drawn).tolist() == pytest.approx(chances.tolist(), abs=0.03)


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.6, 0.9, 1.0])
def test_top_p_never_picks_outside_the_nucleus(top_p: float) -> None:
    for seed in range(60):
        scores = scores_of(seed)
        chances = torch.softmax(scores, -1)
        picked = pick(scores, draw_noise(seed, (SIZE,)), 1.0, top_p)
        likelier = float(chances[chances > chances[picked]].sum())
        assert likelier < top_p + 1e-6


def test_the_smallest_top_p_leaves_the_likeliest() -> None:
    for seed in range(20):
        scores = scores_of(seed)
        assert pick(scores, draw_noise(seed, (SIZE,)), 2.0, 0.01) == int(scores.argmax())


def test_hot_picks_more_kinds_than_cold() -> None:
    scores, noise = scores_of(1), draw_noise(1, (300, SIZE))
    kinds = [
        len({pick(scores, row, heat) for row in noise}) for heat in (MIN_TEMPERATURE, 0.5, 2.0)
    ]
    assert kinds[0] == 1 < kinds[1] < kinds[2]


def recent(*codes: int) -> tuple[Tensor, Tensor]:
    """As the decoder hands them over: newest first, and frame 0's where there is none."""
    oldest = codes[-1] if codes else 9
    held = [*codes, *[oldest] * (PENALTY_WINDOW - len(codes))]
    return torch.tensor(held), torch.arange(PENALTY_WINDOW) < len(codes)


def test_a_penalty_lowers_what_was_chosen_and_nothing_else() -> None:
    scores = torch.tensor([2.0, -2.0, 1.0, 0.0])
    codes, real = recent(0, 1, 0, 0)
    found = penalise(scores, codes, real, torch.tensor(2.0))
    assert found.tolist() == [1.0, -4.0, 1.0, 0.0]


def test_a_penalty_of_1_changes_nothing() -> None:
    scores = scores_of(4)
    codes, real = recent(*range(PENALTY_WINDOW))
    assert torch.equal(penalise(scores, codes, real, torch.tensor(1.0)), scores)


def test_before_the_first_frame_nothing_is_penalised() -> None:
    scores = scores_of(4)
    codes, real = recent()
    assert torch.equal(penalise(scores, codes, real, torch.tensor(2.0)), scores)


@pytest.mark.parametrize("known", range(1, PENALTY_WINDOW + 1))
def test_the_oldest_code_is_penalised_while_the_memory_fills(known: int) -> None:
    """What fills the rest of the memory carries the oldest code too, and does not count."""
    scores = torch.full((SIZE,), 4.0)
    codes, real = recent(*range(known))
    found = penalise(scores, codes, real, torch.tensor(2.0))
    assert found.tolist() == [2.0] * known + [4.0] * (SIZE - known)


def test_a_penalty_changes_the_choice() -> None:
    scores = torch.tensor([2.0, 1.9, 0.0])
    codes, real = recent(0)
    found = penalise(scores, codes, real, torch.tensor(1.5))
    assert pick(scores, torch.ones(3), MIN_TEMPERATURE) == 0
    assert pick(found, torch.ones(3), MIN_TEMPERATURE) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_picks_what_a_cpu_picks() -> None:
    heat, nucleus = torch.tensor(0.8), torch.tensor(0.9)
    same = 0
    for seed in range(200):
        scores, noise = scores_of(seed, 512), draw_noise(seed, (512,))
        there = choose(scores.cuda(), noise.cuda(), heat.cuda(), nucleus.cuda())
        same += int(there) == int(choose(scores, noise, heat, nucleus))
    # Where two codes are as good as equal, the last bit of a softmax may decide.
    assert same >= 199
