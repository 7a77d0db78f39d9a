"""Train the codec's decoder (source and filter) and export it to ONNX.

    python -m training.codec_decoder --out build/voice --steps 1500

It learns from dequantised codes, so that it makes up for what the codebooks lose. The loss
compares magnitudes of spectra at several resolutions: phase is the sources' business.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.corpus import shards
from workers.voice.codec_decoder import PITCH_BOOK, CodecDecoder, Pitch, phase_of
from workers.voice.spectrum import HOP, STEPS

RESOLUTIONS = (256, 512, 1024, 2048)
FRAMES = 16  # of a training segment, and one more on each side that the loss does not see
SAMPLES_A_FRAME = HOP * STEPS


def log_spectrum(signal: Tensor, n_fft: int) -> Tensor:
    window = torch.hann_window(n_fft, device=signal.device)
    spectrum = torch.stft(signal, n_fft, n_fft // 4, window=window, return_complex=True)
    power = torch.view_as_real(spectrum).square().sum(-1)
    return (power / window.square().sum() + 1e-8).log()


def loss_of(made: Tensor, real: Tensor) -> Tensor:
    """Mean absolute difference of log power, nats, and of the loud parts' amplitude."""
    total = torch.zeros(())
    for n_fft in RESOLUTIONS:
        a, b = log_spectrum(made, n_fft), log_spectrum(real, n_fft)
        loud = ((0.5 * a).exp() - (0.5 * b).exp()).norm() / (0.5 * b).exp().norm()
        total = total + (a - b).abs().mean() + loud
    return total / len(RESOLUTIONS)


def load_codec(folder: Path) -> tuple[CodecDecoder, Pitch]:
    """A fresh decoder with the quantiser's codebooks in it."""
    decoder = CodecDecoder()
    quantiser = load_file(folder / "quantiser.safetensors")
    quantiser["mel_books"] = quantiser["mel_books"].flatten(0, 1)
    _, unexpected = decoder.load_state_dict(quantiser, strict=False)
    assert not unexpected, unexpected
    mean, std, _ = quantiser["pitch_stats"].tolist()
    return decoder, Pitch(quantiser["pitch_book"].numpy(), mean, std)


class Segments:
    """Random segments of the corpus: codes, phase, noise and samples."""

    def __init__(self, folder: Path, pitch: Pitch, seed: int) -> None:
        with np.load(folder / "codes.npz") as data:
            self.codes, counts = data["codes"].astype(np.int64), data["counts"]
        parts = list(shards(folder / "corpus"))
        self.samples = np.concatenate([samples for samples, _ in parts])
        lengths = np.array([line["samples"] for _, lines in parts for line in lines])
        self.first_sample = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        self.first_frame = np.concatenate([[0], np.cumsum(counts)[:-1]])
        self.usable = lengths // SAMPLES_A_FRAME
        self.pitch = pitch
        self.rng = np.random.default_rng(seed)
        self.long_enough = np.flatnonzero(self.usable >= FRAMES + 2)

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        codes, phases, reals = [], [], []
        for sentence in self.rng.choice(self.long_enough, size):
            frames = FRAMES + 2
            at = int(self.rng.integers(0, self.usable[sentence] - frames + 1))
            frame = self.first_frame[sentence] + at
            sample = self.first_sample[sentence] + at * SAMPLES_A_FRAME
            part = self.codes[frame : frame + frames]
            codes.append(part)
            phases.append(phase_of(self.pitch.f0(part[:, PITCH_BOOK])))
            reals.append(self.samples[sample : sample + frames * SAMPLES_A_FRAME])
        noise = self.rng.standard_normal((size, (FRAMES + 2) * SAMPLES_A_FRAME), dtype=np.float32)
        real = np.stack(reals).astype(np.float32) / 32768
        return (
            torch.from_numpy(np.stack(codes)),
            torch.from_numpy(np.stack(phases)),
            torch.from_numpy(noise),
            torch.from_numpy(real),
        )


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    decoder, pitch = load_codec(args.out)
    segments = Segments(args.out, pitch, args.seed)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=args.rate, betas=(0.9, 0.98))
    inner = slice(SAMPLES_A_FRAME, -SAMPLES_A_FRAME)
    begun, total, log = time.monotonic(), 0.0, []
    for step in range(1, args.steps + 1):
        rate = args.rate * min(1, step / 50) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate + 1e-5
        codes, phase, noise, real = segments.batch(args.batch)
        loss = loss_of(decoder(codes, phase, noise)[:, inner], real[:, inner])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += float(loss.detach())
        if step % 50 == 0:
            pace = (time.monotonic() - begun) / step
            log.append({"step": step, "loss": round(total / 50, 4)})
            print(f"step {step}: loss {total / 50:.4f}, {pace:.2f} s a step", flush=True)
            total = 0.0
        if step % 250 == 0 or step == args.steps:
            weights = {k: v.contiguous() for k, v in decoder.state_dict().items()}
            metadata = {"training": json.dumps({"seed": args.seed, "log": log})}
            save_file(weights, args.out / "codec_decoder.safetensors", metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/voice"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    train(parser.parse_args())


if __name__ == "__main__":
    main()
