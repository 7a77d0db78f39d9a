"""Resample a signal that arrives in chunks, with a polyphase windowed sinc."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from workers.model.contract import Audio

_ZEROS = 16
"""Zero crossings of the sinc on each side: more are steeper and slower."""

_BLOCK = 1 << 14
"""Output samples per step, which bounds the memory of long signals."""


class Resampler:
    """Takes chunks in order; the output does not depend on where they were cut."""

    def __init__(self, rate: int, target: int) -> None:
        """Rates in Hz."""
        common = math.gcd(rate, target)
        self._up = target // common
        self._down = rate // common
        self._taps, self._half = _phases(self._up, rate, target)
        self._tail: Audio = np.zeros(self._half, np.float32)
        self._tail_at = -self._half
        """Index, among the input samples, of the tail's first sample."""
        self._received = 0
        self._next = 0
        """Index of the next output sample."""

    def feed(self, chunk: Audio) -> Audio:
        """Return the output samples that ``chunk`` completes."""
        self._received += len(chunk)
        # Output n lies at input n * down / up and needs `half` samples to the right of it.
        ready = max(0, ((self._received - self._half) * self._up - 1) // self._down + 1)
        return self._until(np.concatenate([self._tail, chunk]), ready)

    def finish(self) -> Audio:
        """Return the rest, as if silence followed."""
        length = -(-self._received * self._up // self._down)
        silence = np.zeros(self._half + 1, np.float32)
        return self._until(np.concatenate([self._tail, silence]), length)

    def _until(self, signal: Audio, end: int) -> Audio:
        parts = []
        for begin in range(self._next, end, _BLOCK):
            at = np.arange(begin, min(end, begin + _BLOCK), dtype=np.int64) * self._down
            left = at // self._up - self._half + 1 - self._tail_at
            windows = np.lib.stride_tricks.sliding_window_view(signal, 2 * self._half)[left]
            parts.append(np.einsum("nt,nt->n", windows, self._taps[at % self._up]))
        self._next = max(self._next, end)
        keep_from = max(
            self._tail_at, self._next * self._down // self._up - self._half + 1 - self._half
        )
        self._tail = signal[keep_from - self._tail_at :]
        self._tail_at = keep_from
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _phases(up: int, rate: int, target: int) -> tuple[NDArray[np.float32], int]:
    """Return the filters for every position between two input samples, shape (up, 2 * half)."""
    cutoff = min(1.0, target / rate) * 0.95
    half = math.ceil(_ZEROS / cutoff)
    offsets = np.arange(-half + 1, half + 1)[None, :] - np.arange(up)[:, None] / up
    window = 0.5 + 0.5 * np.cos(np.pi * np.clip(offsets / half, -1, 1))
    taps = cutoff * np.sinc(cutoff * offsets) * window
    taps /= taps.sum(axis=1, keepdims=True)
    return taps.astype(np.float32), half
