"""The codec's decoder: codes to samples through a source and a filter.

Two sources, a train of harmonics at the pitch and noise, go through one filter each, sample for
sample what a vocal tract does. A small convolutional network reads the dequantised codes and
shapes both filters, a spectrum every 12.5 ms. Filters have minimum phase, as the teacher's have.
Discrete Fourier transforms are written as convolutions with fixed kernels, so that the exported
graph holds nothing that a provider could not take.

Phase and noise are inputs: the same codes, phase and noise give the same samples everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from workers.voice.spectrum import HOP, N_FFT, N_MELS, SAMPLE_RATE, STEPS, mel_filters

PITCH_BOOK = 1
"""The codebook that holds pitch and voicing; the others add up to the envelope."""
WINDOW = 2 * HOP
LENGTH = 640
"""Of the transform: the window and 15 ms for the filter to ring."""
BINS = LENGTH // 2 + 1
HARMONICS = 64
CONTEXT = 4
"""Frames on each side that a sample depends on: 2 + 2 * blocks steps, and a window."""


@dataclass(frozen=True)
class Pitch:
    """How codes of the pitch's codebook become a frequency."""

    book: NDArray[np.float32]
    """(codebook_size, STEPS * 2): normalised log f0 and scaled voicing of each step."""
    mean: float
    std: float

    def f0(self, codes: NDArray[np.int64]) -> NDArray[np.float64]:
        """(frames,) codes of the pitch's codebook -> (frames * STEPS,) in Hz."""
        log_f0 = self.book[codes].reshape(-1, 2)[:, 0].astype(np.float64)
        return np.exp(log_f0 * self.std + self.mean)


def _transform() -> Tensor:
    """(2 * BINS, 1, WINDOW): windowed real and imaginary rows of the transform."""
    time = torch.arange(WINDOW, dtype=torch.float64)
    angle = 2 * math.pi / LENGTH * torch.outer(torch.arange(BINS, dtype=torch.float64), time)
    rows = torch.cat([angle.cos(), -angle.sin()]) * torch.hann_window(WINDOW, dtype=torch.float64)
    return rows.float().unsqueeze(1)


def _inverse() -> Tensor:
    """(2 * BINS, 1, LENGTH): the inverse transform's rows."""
    time = torch.arange(LENGTH, dtype=torch.float64)
    angle = 2 * math.pi / LENGTH * torch.outer(torch.arange(BINS, dtype=torch.float64), time)
    twice = torch.full((BINS, 1), 2.0, dtype=torch.float64)
    twice[0] = twice[-1] = 1.0
    rows = torch.cat([angle.cos() * twice, -angle.sin() * twice]) / LENGTH
    return rows.float().unsqueeze(1)


def _minimum_phase() -> Tensor:
    """(BINS, BINS): log magnitude -> phase, by way of the folded cepstrum."""
    bins = torch.eye(BINS, dtype=torch.float64)
    full = torch.cat([bins, bins[1:-1].flip(0)])  # the even extension of each bin
    cepstrum = torch.fft.ifft(full, dim=0).real
    fold = torch.zeros(LENGTH, 1, dtype=torch.float64)
    fold[0] = fold[LENGTH // 2] = 1.0
    fold[1 : LENGTH // 2] = 2.0
    return torch.fft.fft(cepstrum * fold, dim=0)[:BINS].imag.float()


def _mel_to_bins() -> Tensor:
    """(BINS, N_MELS): the envelope between the mel bands' centres, by linear interpolation."""
    wide = mel_filters() @ np.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
    at = np.linspace(0, SAMPLE_RATE / 2, BINS)
    rows = [np.interp(at, wide, row) for row in np.eye(N_MELS)]
    return torch.from_numpy(np.stack(rows, axis=1)).float()


class ResidualConv(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.near = nn.Conv1d(width, width, 5, padding=2)
        self.mix = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(F.silu(self.near(F.silu(x))))  # type: ignore[no-any-return]


class CodecDecoder(nn.Module):
    """codes (batch, frames, books), phase and noise (batch, samples) -> (batch, samples)."""

    transform: Tensor
    inverse: Tensor
    minimum_phase: Tensor
    mel_to_bins: Tensor
    harmonics: Tensor
    harmonic_phase: Tensor
    book_offsets: Tensor

    def __init__(
        self, num_codebooks: int = 8, codebook_size: int = 512, width: int = 192, blocks: int = 4
    ) -> None:
        super().__init__()
        self.register_buffer(
            "mel_books", torch.zeros((num_codebooks - 1) * codebook_size, STEPS * N_MELS)
        )
        self.register_buffer("pitch_book", torch.zeros(codebook_size, STEPS * 2))
        self.register_buffer("mel_mean", torch.zeros(N_MELS))
        self.register_buffer("mel_scale", torch.ones(1))
        self.register_buffer("pitch_stats", torch.zeros(3))
        for name, value in (
            ("transform", _transform()),
            ("inverse", _inverse()),
            ("minimum_phase", _minimum_phase()),
            ("mel_to_bins", _mel_to_bins()),
            ("harmonics", torch.arange(1, HARMONICS + 1).float()),
            ("book_offsets", torch.arange(num_codebooks - 1) * codebook_size),
        ):
            self.register_buffer(name, value, persistent=False)
        self.enter = nn.Conv1d(N_MELS + 2, width, 5, padding=2)
        self.blocks = nn.Sequential(*(ResidualConv(width) for _ in range(blocks)))
        self.leave = nn.Conv1d(width, 2 * N_MELS, 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.constant_(self.leave.bias, -2.0)  # type: ignore[arg-type]

    def dequantise(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """codes -> normalised envelope (batch, steps, N_MELS), pitch (batch, steps, 2)."""
        batch, frames, _ = codes.shape
        pitch = F.embedding(codes[:, :, PITCH_BOOK], self.pitch_book)  # type: ignore[arg-type]
        wide = torch.cat([codes[:, :, :PITCH_BOOK], codes[:, :, PITCH_BOOK + 1 :]], dim=2)
        mel = F.embedding(wide + self.book_offsets, self.mel_books).sum(2)  # type: ignore[arg-type]
        return mel.view(batch, frames * STEPS, N_MELS), pitch.view(batch, frames * STEPS, 2)

    def sources(self, phase: Tensor, f0: Tensor) -> Tensor:
        """Harmonics below the highest frequency: phase (batch, samples) -> (batch, samples)."""
        below = (f0.unsqueeze(1) * self.harmonics.view(1, -1, 1) < 0.48 * SAMPLE_RATE).float()
        below = below / (below.sum(1, keepdim=True) + 1.0).sqrt()
        per_sample = below.repeat_interleave(HOP, dim=2)
        turns = phase.unsqueeze(1) * self.harmonics.view(1, -1, 1)
        return (turns.cos() * per_sample).sum(1)

    def spectra(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, samples) -> real and imaginary part, (batch, BINS, steps) each."""
        padded = F.pad(source.unsqueeze(1), (HOP // 2, HOP // 2))
        both = F.conv1d(padded, self.transform, stride=HOP)
        return both[:, :BINS], both[:, BINS:]

    def filters(self, mel: Tensor, pitch: Tensor) -> tuple[Tensor, Tensor]:
        """Log magnitudes of the two filters: (batch, steps, BINS) each."""
        x = torch.cat([mel, pitch], dim=2).transpose(1, 2)
        shape = self.leave(F.silu(self.blocks(self.enter(x)))).transpose(1, 2)
        level = 0.5 * (mel * self.mel_scale + self.mel_mean)
        voiced, noisy = shape[:, :, :N_MELS] + level, shape[:, :, N_MELS:] + level
        return voiced @ self.mel_to_bins.T, noisy @ self.mel_to_bins.T

    def forward(self, codes: Tensor, phase: Tensor, noise: Tensor) -> Tensor:
        mel, pitch = self.dequantise(codes)
        f0 = (pitch[:, :, 0] * self.pitch_stats[1] + self.pitch_stats[0]).exp()
        total: list[Tensor] = []
        sources = (self.sources(phase, f0), noise)
        for source, log_size in zip(sources, self.filters(mel, pitch), strict=True):
            log_size = log_size.clamp(-14.0, 6.0)
            angle = log_size @ self.minimum_phase.T
            size = log_size.exp()
            real = (size * angle.cos()).transpose(1, 2)
            imag = (size * angle.sin()).transpose(1, 2)
            left, right = self.spectra(source)
            total.append(torch.cat([left * real - right * imag, left * imag + right * real], 1))
        wave = F.conv_transpose1d(total[0] + total[1], self.inverse, stride=HOP)
        start = HOP // 2
        return wave[:, 0, start : start + phase.shape[1]]


def phase_of(f0: NDArray[np.float64]) -> NDArray[np.float32]:
    """(steps,) Hz -> (steps * HOP,) phase in radians, wrapped to [0, 2 pi).

    The frequency moves linearly between the middles of the steps. Only the next step's frequency
    is looked at, so that a longer sentence begins with the same phases.
    """
    middles = (np.arange(len(f0)) + 0.5) * HOP
    per_sample = np.interp(np.arange(len(f0) * HOP) + 0.5, middles, f0)
    turns = np.cumsum(per_sample / SAMPLE_RATE)
    return np.asarray(2 * np.pi * (turns - np.floor(turns)), dtype=np.float32)
