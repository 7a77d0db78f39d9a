"""Train the DualAR decoder on the corpus's codes.

    python -m training.dual_ar --out build/voice --steps 4000

Checkpoints are written every few hundred steps; the same command resumes from the last one. On a
GPU it trains there. On a CPU, bfloat16 is tried against float32 first and the faster one is used.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from training import recipe
from workers.models.voice.dual_ar import DualAR, DualARConfig
from workers.models.voice.phones import SIGNS
from workers.models.voice.spectrum import HOP, SAMPLE_RATE
from workers.models.voice.timing import Timing, timing

FAST_SHARE = 0.3  # of the frames, that the fast transformer learns from in a step
FORGET, CONFUSE = 0.2, 0.05  # of previous frames, of single codes: see ``previous``


@dataclass(frozen=True)
class Sentence:
    symbols: Tensor  # (phones,)
    sign: int
    log_steps: Tensor  # (phones,)
    timing: Timing
    codes: Tensor  # (frames, num_codebooks)


@dataclass(frozen=True)
class Batch:
    symbols: Tensor
    phones: Tensor
    sign: Tensor
    log_steps: Tensor
    phone_of: Tensor
    places: Tensor
    codes: Tensor
    frames: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


def load_sentences(folder: Path) -> list[Sentence]:
    with np.load(recipe.input_file(folder, "codes.npz")) as data:
        codes, counts = torch.from_numpy(data["codes"]).long(), data["counts"]
    with np.load(recipe.input_file(folder, "features.npz")) as data:
        lines = json.loads(str(data["lines"]))
    symbols = json.loads(recipe.input_file(folder, "symbols.json").read_text())
    found, start = [], 0
    for line, count, marked in zip(lines, counts, symbols, strict=False):
        ends = [end * SAMPLE_RATE / HOP for _, end in line["phones"]]
        said = timing(ends)
        part = codes[start : start + count]
        start += count
        frames = min(len(part), said.frames)
        steps = torch.tensor(np.diff([0.0, *ends])).float().clamp(min=0.25)
        found.append(
            Sentence(
                torch.tensor(marked),
                SIGNS.find(line["text"][-1]) if line["text"][-1] in SIGNS else 0,
                steps.log(),
                Timing(said.phone_of[:frames], said.places[:frames]),
                part[:frames],
            )
        )
    return found


def split(sentences: list[Sentence], held_back: int) -> tuple[list[Sentence], list[Sentence]]:
    """Split into sentences for validation, always the same, and for training."""
    if not 0 < held_back < len(sentences):
        raise recipe.StepError(
            f"--held-back {held_back} of {len(sentences)} sentences must leave some for training",
            recipe.BAD_ARGUMENT,
        )
    random.Random(0).shuffle(sentences)
    return sentences[:held_back], sentences[held_back:]


def stack(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def collate(sentences: list[Sentence]) -> Batch:
    return Batch(
        stack([s.symbols for s in sentences]),
        torch.tensor([len(s.symbols) for s in sentences]),
        torch.tensor([s.sign for s in sentences]),
        stack([s.log_steps for s in sentences]),
        stack([s.timing.phone_of for s in sentences]),
        stack([s.timing.places for s in sentences]),
        stack([s.codes for s in sentences]),
        torch.tensor([len(s.codes) for s in sentences]),
    )


def batches(sentences: list[Sentence], size: int, rng: random.Random) -> Iterator[Batch]:
    """Yield batches without end: sentences of similar length together, in random order."""
    while True:
        order = list(range(len(sentences)))
        rng.shuffle(order)
        groups = []
        for at in range(0, len(order), size * 24):
            near = sorted(order[at : at + size * 24], key=lambda i: len(sentences[i].codes))
            groups += [near[k : k + size] for k in range(0, len(near), size)]
        rng.shuffle(groups)
        for group in groups:
            yield collate([sentences[i] for i in group])


def previous(model: DualAR, codes: Tensor, training: bool) -> Tensor:
    """Embed the previous frame's codes: (batch, frames, dim), zeros before the first frame.

    In training some frames are forgotten and some codes confused, so that when speaking the
    decoder leans on the phones and recovers from a bad frame instead of following it.
    """
    before = codes[:, :-1]
    if training:
        other = torch.randint_like(before, model.config.codebook_size)
        before = torch.where(torch.rand(before.shape, device=codes.device) < CONFUSE, other, before)
    known = model.embed_codes(before)
    if training:
        keep = torch.rand(known.shape[:2], device=codes.device) >= FORGET
        known = known * keep.unsqueeze(-1)
    return functional.pad(known, (0, 0, 1, 0))


def losses(model: DualAR, batch: Batch, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return slow, fast and duration loss; the first two in nats per code."""
    read = model.read(batch.symbols, batch.sign, batch.phones)
    spoken = torch.arange(batch.symbols.shape[1], device=read.device) < batch.phones[:, None]
    missed = model.durations(read).float() - batch.log_steps
    duration = missed[spoken].square().mean()
    x = model.condition(read, batch.phone_of, batch.places)
    x = x + previous(model, batch.codes, model.training)
    hidden = model.slow(x)
    valid = torch.arange(batch.codes.shape[1], device=read.device) < batch.frames[:, None]
    hidden, codes = hidden[valid], batch.codes[valid]
    slow = functional.cross_entropy(model.output(hidden).float(), codes[:, 0])
    if share < 1:
        picked = torch.randperm(len(codes), device=read.device)[: int(len(codes) * share)]
        hidden, codes = hidden[picked], codes[picked]
    logits = model.fast(hidden, codes).float()
    fast = functional.cross_entropy(logits.flatten(0, 1), codes[:, 1:].flatten())
    return slow, fast, duration


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def faster_dtype(model: DualAR, batch: Batch, device: torch.device) -> torch.dtype:
    """Time both dtypes: bfloat16 is four times faster on some processors and slower on others."""
    took = {}
    for dtype in (torch.bfloat16, torch.float32):
        for _ in range(2):  # the first is a warm-up
            begun = time.perf_counter()
            with autocast(device, dtype):
                slow, fast, _ = losses(model, batch, FAST_SHARE)
            (slow + fast).backward()
            took[dtype] = time.perf_counter() - begun
        model.zero_grad()
    print({str(k): round(v, 2) for k, v in took.items()}, "seconds a step", flush=True)
    return min(took, key=lambda dtype: took[dtype])


@torch.no_grad()
def validate(
    model: DualAR, sentences: list[Sentence], device: torch.device, dtype: torch.dtype
) -> list[float]:
    model.eval()
    sums = torch.zeros(3)
    parts = [sentences[i : i + 40] for i in range(0, len(sentences), 40)]
    for part in parts:
        with autocast(device, dtype):
            found = losses(model, collate(part).to(device), 1.0)
        sums += torch.stack(found).float().cpu()
    model.train()
    return [round(float(v), 4) for v in sums / len(parts)]


def save_weights(model: DualAR, path: Path, report: dict[str, object]) -> None:
    """Save in bfloat16, without pickle, the configuration in the file's header."""
    weights = {
        k: v.detach().to(torch.bfloat16).cpu().contiguous() for k, v in model.state_dict().items()
    }
    metadata = {"config": json.dumps(model.config.to_json()), "training": json.dumps(report)}
    save_file(weights, path, metadata)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    held_back, sentences = split(load_sentences(args.out), args.held_back)
    config = DualARConfig()
    model = DualAR(config).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(sentences)} sentences")
    decays = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decays, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=args.rate,
        betas=(0.9, 0.98),
    )
    checkpoint, step, log = args.out / "dual_ar.pt", 0, []
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, log = saved["step"], saved["log"]
        print(f"resuming from step {step}")
    source = batches(sentences, args.batch, random.Random(args.seed * 1000 + step))
    dtype = torch.bfloat16
    if device.type == "cpu":
        dtype = faster_dtype(model, next(source), device)
    begun, first, sums = time.monotonic(), step, torch.zeros(3)
    while step < args.steps:
        warm = min(1.0, (step + 1) / 200)
        rate = args.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with autocast(device, dtype):
            slow, fast, duration = losses(model, next(source).to(device), FAST_SHARE)
        (slow + fast + duration).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sums += torch.stack([slow, fast, duration]).detach().float().cpu()
        step += 1
        if step % 50 == 0:
            pace = (time.monotonic() - begun) / (step - first)
            means = [round(float(v), 4) for v in sums / 50]
            sums.zero_()
            print(f"step {step}: slow, fast, duration {means}, {pace:.2f} s a step", flush=True)
        if step % args.every == 0 or step == args.steps:
            found = validate(model, held_back, device, dtype)
            log.append({"step": step, "validation": found})
            print(f"step {step}: validation {found}", flush=True)
            part = checkpoint.with_suffix(".part")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": step, "log": log}, part)
            part.rename(checkpoint)
            report = {"sentences": len(sentences), "seed": args.seed, "log": log}
            save_weights(model, args.out / "dual_ar.safetensors", report)


@recipe.step()
def main() -> None:
    parser = recipe.parser(__doc__)
    parser.add_argument("--steps", type=recipe.count, default=4000)
    parser.add_argument("--batch", type=recipe.count, default=20)
    parser.add_argument("--rate", type=float, default=1.2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--held-back", type=recipe.count, default=200, help="sentences for validation"
    )
    parser.add_argument("--every", type=recipe.count, default=250, help="steps between checkpoints")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
