"""Features of speech for the codec: a log-mel spectrogram, pitch and voicing.

Everything is sampled every 12.5 ms; a few such steps are one frame of the decoder.

    python -m training.features --out build/voice --sentences 16000
"""

from __future__ import annotations

import json
import math
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training import recipe
from training.corpus import SAMPLE_RATE, shards
from workers.models.voice.spectrum import FLOOR, HOP, N_FFT, WINDOW, mel_filters, window

F0_FLOOR, F0_CEIL = 90, 300  # Hz: the teacher speaks between about 120 and 260
CORRELATED = 640  # samples that are compared with those a period later: 40 ms
OCTAVE_COST = 0.05  # of the longest period against the shortest
JUMP_COST = 4.0  # of one natural logarithm of pitch between two steps


def log_mel(samples: NDArray[np.float64]) -> NDArray[np.float32]:
    """Compute the log of the mean power in each band: (n,) -> (n // HOP + 1, N_MELS)."""
    steps = len(samples) // HOP + 1
    padded = np.pad(samples, (WINDOW // 2, WINDOW // 2 + HOP))
    at = np.arange(steps)[:, None] * HOP + np.arange(WINDOW)
    spectra = np.abs(np.fft.rfft(padded[at] * window(), N_FFT)) ** 2
    power = spectra / np.square(window()).sum() * HOP
    return np.asarray(np.log(power @ mel_filters().T + FLOOR), dtype=np.float32)


def pitch(samples: NDArray[np.float64]) -> NDArray[np.float32]:
    """Estimate log f0 (interpolated where unvoiced) and voicing: (n,) -> (n // HOP + 1, 2).

    Normalised cross-correlation, and the best path through it (Viterbi).
    """
    steps = len(samples) // HOP + 1
    shortest, longest = SAMPLE_RATE // F0_CEIL, SAMPLE_RATE // F0_FLOOR
    before = CORRELATED // 2 + longest // 2
    padded = np.pad(samples, (before, before + longest + HOP))
    parts = padded[np.arange(steps)[:, None] * HOP + np.arange(CORRELATED + longest)]
    parts = parts - parts.mean(1, keepdims=True)
    size = 2 ** math.ceil(math.log2(CORRELATED + longest))
    first = np.fft.rfft(parts[:, :CORRELATED], size)
    product = np.fft.irfft(np.conj(first) * np.fft.rfft(parts, size), size)[:, : longest + 1]
    energy = np.cumsum(np.pad(parts**2, ((0, 0), (1, 0))), 1)
    later = energy[:, CORRELATED : CORRELATED + longest + 1] - energy[:, : longest + 1]
    correlation = product / np.sqrt(later[:, :1] * later + 1e-6 * CORRELATED)

    lags = np.arange(shortest, longest + 1)
    score = correlation[:, shortest:] - OCTAVE_COST * (lags - shortest) / (longest - shortest)
    jumps = JUMP_COST * np.abs(np.log(lags)[:, None] - np.log(lags)[None])
    best, back = score[0], np.zeros(score.shape, dtype=np.int64)
    for step in range(1, steps):
        ways = best[:, None] - jumps
        back[step] = ways.argmax(0)
        best = ways.max(0) + score[step]
    path = np.zeros(steps, dtype=np.int64)
    path[-1] = best.argmax()
    for step in range(steps - 1, 0, -1):
        path[step - 1] = back[step, path[step]]
    every = np.arange(steps)
    lag = np.clip(lags[path], 1, longest - 1)
    left, mid, right = (correlation[every, lag + k] for k in (-1, 0, 1))
    curve = np.minimum(left - 2 * mid + right, -1e-9)
    shift = np.clip(0.5 * (left - right) / curve, -0.5, 0.5)
    log_f0 = np.log(SAMPLE_RATE / (lag + shift))
    voicing = np.clip(mid, 0, 1)
    voiced = np.flatnonzero(voicing > 0.5)
    if len(voiced):
        log_f0 = np.interp(every, voiced, log_f0[voiced])
    return np.stack([log_f0, voicing], axis=1).astype(np.float32)


def _analyse_shard(shard: tuple[NDArray[np.int16], list[dict[str, Any]]]) -> list[Any]:
    samples, lines = shard
    start, found = 0, []
    for line in lines:
        stop = start + int(line["samples"])
        signal = samples[start:stop].astype(np.float64) / 32768
        found.append((log_mel(signal).astype(np.float16), pitch(signal)))
        start = stop
    return found


def write(folder: Path, processes: int, most: int) -> None:
    """Write ``features.npz``: the steps of all sentences, concatenated."""
    mels, pitches, lines = [], [], []
    with ProcessPoolExecutor(processes) as pool:
        parts: list[tuple[NDArray[np.int16], list[dict[str, Any]]]] = []
        for part in shards(recipe.input_file(folder, recipe.CORPUS)):
            if sum(len(listed) for _, listed in parts) < most:
                parts.append(part)
        for (_, listed), found in zip(parts, pool.map(_analyse_shard, parts), strict=True):
            for line, (mel, spoken) in zip(listed, found, strict=True):
                mels.append(mel)
                pitches.append(spoken)
                lines.append({**line, "steps": len(mel)})
            print(f"{len(lines)} sentences", flush=True)
    np.savez(
        folder / "features.npz",
        mel=np.concatenate(mels),
        pitch=np.concatenate(pitches),
        lines=json.dumps(lines),
    )


@recipe.step()
def main() -> None:
    parser = recipe.parser(__doc__)
    parser.add_argument("--sentences", type=recipe.count, default=16_000)
    parser.add_argument("--processes", type=recipe.count, default=2)
    args = parser.parse_args()
    write(args.out, args.processes, args.sentences)


if __name__ == "__main__":
    main()
