"""From phone durations to the phones of each frame."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.models.voice.spectrum import STEPS


@dataclass(frozen=True)
class Timing:
    """One sentence's frames."""

    phone_of: Tensor
    """(frames, STEPS + 1): the phone of each step, and of the next frame's first step."""
    places: Tensor
    """(frames, STEPS + 1, 3): share of the phone elapsed and left, logarithm of its steps."""

    @property
    def frames(self) -> int:
        return len(self.phone_of)


def timing(ends: list[float]) -> Timing:
    """Divide a sentence into frames; ``ends``: the end of each phone in steps, ascending."""
    frames = max(1, math.ceil(ends[-1] / STEPS))
    end = torch.tensor(ends, dtype=torch.float32)
    start = torch.cat([torch.zeros(1), end[:-1]])
    length = (end - start).clamp(min=0.25)
    middle = torch.arange(frames * STEPS + 1) + 0.5
    phone = torch.searchsorted(end, middle, right=True).clamp(max=len(ends) - 1)
    gone = ((middle - start[phone]) / length[phone]).clamp(0, 1)
    place = torch.stack([gone, 1 - gone, length[phone].log()], dim=1)
    windows = torch.arange(frames).unsqueeze(1) * STEPS + torch.arange(STEPS + 1)
    return Timing(phone[windows], place[windows])
