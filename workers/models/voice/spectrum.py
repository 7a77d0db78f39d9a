"""The time and frequency grid that the codec, its decoder and the training share."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE = 16_000  # Hz
HOP = 200  # samples of one step: 12.5 ms
STEPS = 2  # steps of one frame: 25 ms
N_FFT = 1024
WINDOW = 512  # samples a spectrum sees: 32 ms
FLOOR = 1e-5  # added to the power in a band: below it is silence
N_MELS = 80


@cache
def mel_filters() -> NDArray[np.float32]:
    """Triangular filters on the mel scale, each with unit sum: (N_MELS, N_FFT // 2 + 1).

    Unit sums make a filter's output the mean power in its band, whatever its width.
    """
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, N_MELS + 2) / 2595) - 1)
    bins = np.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
    rising = (bins[None, :] - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins[None, :]) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.maximum(0, np.minimum(rising, falling))
    # The lowest filters are narrower than the distance of two bins: give them the nearest bin.
    for row, centre in zip(filters, edges[1:-1], strict=True):
        if row.sum() < 0.5:
            row[np.argmin(np.abs(bins - centre))] += 0.5
    return np.asarray(filters / filters.sum(axis=1, keepdims=True), dtype=np.float32)


@cache
def window() -> NDArray[np.float64]:
    """Hann, periodic: (WINDOW,)."""
    return np.hanning(WINDOW + 1)[:-1]
