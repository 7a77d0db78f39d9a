"""Choosing a code from scores without waiting for the device, from noise that was drawn before.

``argmax(p / e)`` with exponential ``e`` picks index i with probability ``p[i]``. The noise is an
input, drawn on the CPU from the request's seed, so that every device and worker picks alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

COLDEST = 1e-4
"""A temperature of 0 is replaced by this, at which the largest score always wins."""
REMEMBERED = 16
"""Frames that the repetition penalty looks back."""


@dataclass(frozen=True)
class Sampling:
    """Of one request. ``top_p`` in (0, 1]; ``repetition_penalty`` of 1 changes nothing."""

    temperature: float = 0.0
    top_p: float = 0.9
    repetition_penalty: float = 1.0


def draw_noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Exponential noise on the CPU; the same for a seed and shape everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape).exponential_(generator=generator).clamp_(min=1e-10)


def penalise(scores: Tensor, recent: Tensor, counts: Tensor, penalty: Tensor) -> Tensor:
    """Make recently chosen codes less likely, each once.

    ``scores``: (size,); ``recent``: (REMEMBERED,) codes, newest first, of which ``counts`` (bool)
    are real, the real ones first; ``penalty``: () tensor.
    """
    # What is not real repeats the newest: a code that is written twice gets the same score twice.
    recent = torch.where(counts, recent, recent[:1])
    chosen = scores.index_select(0, recent)
    less = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    return scores.index_copy(0, recent, torch.where(counts[:1], less, chosen))


def choose(scores: Tensor, noise: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """(size,) scores and exponential noise -> (1,) code. All on the device, nothing is read back.

    ``temperature`` and ``top_p``: () tensors. At COLDEST the noise plays no part.
    """
    chances = torch.softmax(scores.float() / temperature, dim=-1)
    ordered, order = chances.sort(descending=True)
    # Keep the most likely codes whose chances before them sum to less than top_p.
    before = ordered.cumsum(-1) - ordered
    kept = torch.where(before < top_p, ordered, torch.zeros_like(ordered))
    best = (kept / noise.index_select(0, order)).argmax(-1, keepdim=True)
    # However cold, two scores may be so near that the noise would decide.
    return order.index_select(0, best * (temperature > COLDEST))
