"""The codec's decoder: codes to samples.

A small convolutional network smooths the dequantised codes into a log-mel spectrogram. The
waveform starts as an excitation (a train of harmonics where the speech is voiced, noise where it
is not) and is brought to that spectrogram in a few rounds: transform, compare the energy in each
mel band with what it should be, correct every bin by its band's error, transform back. Phases stay
the excitation's, so they continue smoothly from chunk to chunk.

Fourier transforms are convolutions with fixed kernels, so that all providers support every
operator of the exported graph. The excitation is an input: the same codes and excitation give the
same samples.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.models.voice.spectrum import (
    FLOOR,
    HOP,
    N_FFT,
    N_MELS,
    STEPS,
    WINDOW,
    mel_filters,
    window,
)

PITCH_BOOK = 1
"""The codebook that holds pitch and voicing; the others add up to the spectrogram."""
BINS = N_FFT // 2 + 1
ROUNDS = 8
MIN_POWER = 1e-7
"""Power below which a band is not corrected further."""


def _analysis() -> Tensor:
    """Return real and imaginary rows of the windowed transform: (2 * BINS, 1, WINDOW)."""
    angle = 2 * math.pi / N_FFT * np.outer(np.arange(BINS), np.arange(WINDOW))
    rows = np.concatenate([np.cos(angle), -np.sin(angle)]) * window()
    return torch.from_numpy(rows).float().unsqueeze(1)


def _synthesis() -> Tensor:
    """Return the rows of the windowed inverse transform: (2 * BINS, 1, WINDOW)."""
    angle = 2 * math.pi / N_FFT * np.outer(np.arange(BINS), np.arange(WINDOW))
    twice = np.full((BINS, 1), 2.0)
    twice[0] = twice[-1] = 1.0
    rows = np.concatenate([np.cos(angle) * twice, -np.sin(angle) * twice]) / N_FFT * window()
    return torch.from_numpy(rows).float().unsqueeze(1)


def _between_bands() -> Tensor:
    """Return weights (BINS, N_MELS) that interpolate the bands linearly to every bin."""
    bins = np.linspace(0, 1, BINS)
    centres = mel_filters() @ bins
    rows = [np.interp(bins, centres, row) for row in np.eye(N_MELS)]
    return torch.from_numpy(np.stack(rows, axis=1)).float()


class ResidualConv(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.near = nn.Conv1d(width, width, 5, padding=2)
        self.mix = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(functional.silu(self.near(functional.silu(x))))  # type: ignore[no-any-return]


class CodecDecoder(nn.Module):
    """Decodes codes (batch, frames, books) and an excitation (batch, samples) to its samples."""

    analysis: Tensor
    synthesis: Tensor
    overlap: Tensor
    bands: Tensor
    between_bands: Tensor
    book_offsets: Tensor
    mel_books: Tensor
    pitch_book: Tensor
    mel_mean: Tensor
    mel_scale: Tensor
    pitch_stats: Tensor

    def __init__(
        self, num_codebooks: int = 7, codebook_size: int = 512, width: int = 192, blocks: int = 4
    ) -> None:
        super().__init__()
        for name, shape in (
            ("mel_books", ((num_codebooks - 1) * codebook_size, STEPS * N_MELS)),
            ("pitch_book", (codebook_size, STEPS * 2)),
            ("mel_mean", (N_MELS,)),
            ("mel_scale", (1,)),
            ("pitch_stats", (3,)),
        ):
            self.register_buffer(name, torch.zeros(shape))
        for name, value in (
            ("analysis", _analysis()),
            ("synthesis", _synthesis()),
            ("overlap", torch.from_numpy(window() ** 2).float().view(1, 1, -1)),
            # A band's mean power in the scale of the features.
            ("bands", torch.from_numpy(mel_filters() * (HOP / np.square(window()).sum())).float()),
            ("between_bands", _between_bands()),
            ("book_offsets", torch.arange(num_codebooks - 1) * codebook_size),
        ):
            self.register_buffer(name, value, persistent=False)
        self.enter = nn.Conv1d(N_MELS + 2, width, 5, padding=2)
        self.blocks = nn.Sequential(*(ResidualConv(width) for _ in range(blocks)))
        self.leave = nn.Conv1d(width, N_MELS, 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    def dequantise(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Look up codes: normalised spectrogram (batch, steps, N_MELS), pitch (batch, steps, 2)."""
        batch, frames, _ = codes.shape
        pitch = functional.embedding(codes[:, :, PITCH_BOOK], self.pitch_book)
        wide = torch.cat([codes[:, :, :PITCH_BOOK], codes[:, :, PITCH_BOOK + 1 :]], dim=2)
        mel = functional.embedding(wide + self.book_offsets, self.mel_books).sum(2)
        return mel.view(batch, frames * STEPS, N_MELS), pitch.view(batch, frames * STEPS, 2)

    def spectrogram(self, codes: Tensor) -> Tensor:
        """Return the smoothed normalised spectrogram of codes: (batch, steps, N_MELS)."""
        mel, pitch = self.dequantise(codes)
        x = torch.cat([mel, pitch], dim=2).transpose(1, 2)
        found = self.leave(functional.silu(self.blocks(self.enter(x))))
        return mel + found.transpose(1, 2)  # type: ignore[no-any-return]

    def forward(self, codes: Tensor, excitation: Tensor) -> Tensor:
        log_mel = self.spectrogram(codes) * self.mel_scale + self.mel_mean
        wanted = (log_mel.exp() - 0.9 * FLOOR).clamp(min=MIN_POWER).log()
        samples = excitation.shape[1]
        wave = excitation.unsqueeze(1)
        ones = torch.ones_like(log_mel[:, :, :1]).transpose(1, 2)
        share = functional.conv_transpose1d(ones, self.overlap, stride=HOP).clamp(min=0.05)
        for _ in range(ROUNDS):
            padded = functional.pad(wave, (WINDOW // 2, WINDOW // 2 - HOP))
            both = functional.conv1d(padded, self.analysis, stride=HOP)
            real, imag = both[:, :BINS], both[:, BINS:]
            power = (real * real + imag * imag).transpose(1, 2) @ self.bands.T
            error = 0.5 * (wanted - (power + 1e-9).log())
            gain = (error @ self.between_bands.T).clamp(-12.0, 6.0).exp().transpose(1, 2)
            both = torch.cat([real * gain, imag * gain], dim=1)
            whole = functional.conv_transpose1d(both, self.synthesis, stride=HOP) / share
            wave = whole[:, :, WINDOW // 2 : WINDOW // 2 + samples]
        return wave.squeeze(1)
