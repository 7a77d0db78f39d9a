"""Sampling a code from scores without waiting for the device, with noise drawn beforehand.

``argmax(p / e)`` with exponential ``e`` picks index i with probability ``p[i]``. The noise is an
input, drawn on the CPU from the request's seed, so that all devices and workers choose alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_TEMPERATURE = 1e-4
"""Replaces a temperature of 0; at it the largest score always wins."""
PENALTY_WINDOW = 16
"""Frames that the repetition penalty looks back."""


@dataclass(frozen=True)
class Sampling:
    """Settings of one request: ``top_p`` in (0, 1]; a ``repetition_penalty`` of 1 has no effect."""

    temperature: float = 0.0
    top_p: float = 0.9
    repetition_penalty: float = 1.0


def draw_noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Draw exponential noise on the CPU; it depends on seed and shape only."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape).exponential_(generator=generator).clamp_(min=1e-10)


def penalise(scores: Tensor, recent: Tensor, counts: Tensor, penalty: Tensor) -> Tensor:
    """Make recently chosen codes less likely, each once.

    ``scores``: (size,); ``recent``: (PENALTY_WINDOW,) codes, newest first; ``counts`` (bool): which
    of them are real, the real ones first; ``penalty``: () tensor.
    """
    # Unreal entries repeat the newest code: writing the same score twice has no effect.
    recent = torch.where(counts, recent, recent[:1])
    chosen = scores.index_select(0, recent)
    less = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    return scores.index_copy(0, recent, torch.where(counts[:1], less, chosen))


def choose(scores: Tensor, noise: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """Choose a code (1,) from (size,) scores and exponential noise, all on the device.

    ``temperature`` and ``top_p``: () tensors. At MIN_TEMPERATURE the noise has no effect.
    """
    chances = torch.softmax(scores.float() / temperature, dim=-1)
    ordered, order = chances.sort(descending=True)
    # Keep each code if the chances of all likelier codes sum to less than top_p.
    before = ordered.cumsum(-1) - ordered
    kept = torch.where(before < top_p, ordered, torch.zeros_like(ordered))
    best = (kept / noise.index_select(0, order)).argmax(-1, keepdim=True)
    # Even at the minimum, two scores may be so close that the noise would decide.
    return order.index_select(0, best * (temperature > MIN_TEMPERATURE))
