"""The excitation: the codec decoder's second input, made from the codes of the pitch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workers.models.voice.spectrum import HOP, SAMPLE_RATE

MAX_HARMONIC = 7800.0  # Hz of the highest harmonic
BREATH = 0.03  # noise in voiced speech
HISS = 0.7  # noise in unvoiced speech
VOICING_START, VOICING_SPAN = (
    0.35,
    0.3,
)  # of voicing: noise below the start, harmonics above the span, a mix within it


@dataclass(frozen=True)
class PitchBook:
    """The codebook of pitch and voicing."""

    book: NDArray[np.float32]
    """(codebook_size, STEPS * 2): normalised log f0 and scaled voicing of each step."""
    mean: float
    std: float
    voicing_weight: float

    def contour(self, codes: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Look up codes (frames,): f0 in Hz and voicing in [0, 1], (frames * STEPS,) each."""
        steps = self.book[codes].reshape(-1, 2).astype(np.float64)
        return np.exp(steps[:, 0] * self.std + self.mean), steps[:, 1] * self.voicing_weight


def excitation(
    f0: NDArray[np.float64], voicing: NDArray[np.float64], noise: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Mix harmonics and noise: (steps,), (steps,) and (steps * HOP,) -> (steps * HOP,).

    A sample depends on the steps before it and on the next one only, so the excitation of a
    sentence's beginning does not change with what follows.
    """
    samples = len(f0) * HOP
    middles = (np.arange(len(f0)) + 0.5) * HOP
    hertz = np.interp(np.arange(samples) + 0.5, middles, f0)
    voiced = np.interp(np.arange(samples), np.arange(len(f0)) * HOP, voicing)
    turns = np.cumsum(hertz / SAMPLE_RATE)
    phase = 2 * np.pi * (turns - np.floor(turns))
    count = np.floor(MAX_HARMONIC / hertz)
    # cos(p) + cos(2p) + ... + cos(count p), in closed form; the limit at p = 0 is count.
    half = np.sin(phase / 2)
    safe = np.where(np.abs(half) < 1e-6, 1.0, half)
    train = (np.sin((count + 0.5) * phase) / safe - 1) / 2
    train = np.where(np.abs(half) < 1e-6, count, train) / np.sqrt(count + 1)
    gate = np.clip((voiced - VOICING_START) / VOICING_SPAN, 0, 1)
    made = gate * train + (np.sqrt(1 - gate * gate) * HISS + BREATH) * noise
    return np.asarray(made, dtype=np.float32)
