"""What the codec sees of speech: a smooth spectral envelope, the pitch, and whether it is voiced.

WORLD separates them, so the envelope does not depend on the pitch. Everything is sampled every
12.5 ms; four such steps are one frame of the decoder (50 ms).

    python -m training.features --out build/voice
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.corpus import SAMPLE_RATE, shards
from workers.voice.spectrum import HOP, N_FFT, N_MELS, mel_filters

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pyworld asks pkg_resources for its version
    import pyworld

F0_FLOOR, F0_CEIL = 80.0, 320.0  # Hz: the teacher speaks between about 120 and 260
LOWEST = 1e-6  # of the envelope's power: below it the teacher is silent


def analyse(samples: NDArray[np.int16]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Samples at 16 kHz -> log-mel envelope (steps, N_MELS) and (steps, 2): log f0, voicing.

    The pitch is carried on through unvoiced steps by interpolation, so that it has no jumps.
    """
    signal = samples.astype(np.float64) / 32768
    period = 1000 * HOP / SAMPLE_RATE
    coarse, times = pyworld.dio(
        signal, SAMPLE_RATE, f0_floor=F0_FLOOR, f0_ceil=F0_CEIL, frame_period=period
    )
    f0 = pyworld.stonemask(signal, coarse, times, SAMPLE_RATE)
    envelope = pyworld.cheaptrick(signal, f0, times, SAMPLE_RATE, fft_size=N_FFT)
    mel = np.log(np.maximum(envelope @ mel_filters().astype(np.float64).T, LOWEST))
    voiced = f0 > 0
    if voiced.any():
        at = np.flatnonzero(voiced)
        log_f0 = np.interp(np.arange(len(f0)), at, np.log(f0[at]))
    else:
        log_f0 = np.full(len(f0), np.log(170.0))
    pitch = np.stack([log_f0, voiced.astype(np.float64)], axis=1)
    return mel.astype(np.float32), pitch.astype(np.float32)


def _analyse_shard(shard: tuple[Any, list[dict[str, Any]]]) -> list[Any]:
    samples, lines = shard
    start, found = 0, []
    for line in lines:
        stop = start + int(line["samples"])
        found.append(analyse(samples[start:stop]))
        start = stop
    return found


def _with_lines(folder: Path) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    yield from shards(folder)


def write(folder: Path, processes: int) -> None:
    """Write ``features.npz``: every sentence's steps one after another, half precision."""
    mels, pitches, lines = [], [], []
    with ProcessPoolExecutor(processes) as pool:
        everything = list(_with_lines(folder / "corpus"))
        for (_, shard_lines), found in zip(
            everything, pool.map(partial(_analyse_shard), everything), strict=True
        ):
            for line, (mel, pitch) in zip(shard_lines, found, strict=True):
                mels.append(mel.astype(np.float16))
                pitches.append(pitch)
                lines.append({**line, "steps": len(mel)})
            print(f"{len(lines)} sentences", flush=True)
    np.savez(
        folder / "features.npz",
        mel=np.concatenate(mels),
        pitch=np.concatenate(pitches),
        lines=json.dumps(lines),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/voice"))
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    write(args.out, args.processes)


if __name__ == "__main__":
    main()
