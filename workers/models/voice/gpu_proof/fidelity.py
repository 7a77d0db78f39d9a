"""Do graphs compute what eager execution computes, and half precision nearly what float32 does?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workers.model.contract import Work
from workers.models.voice.decoding import FrameDecoder
from workers.models.voice.dual_ar import DualAR
from workers.models.voice.gpu_proof import subjects
from workers.models.voice.gpu_proof.job import Job, ProofError, Rows
from workers.models.voice.gpu_proof.subjects import GREEDY, Subject
from workers.models.voice.sampling import Sampling

WARM = Sampling(temperature=0.8)
ALIKE = 0.9999
"""The least cosine between a graph's scores and eager execution's, over a codebook of a frame."""


class Probed(FrameDecoder):
    """A decoder that keeps the scores from which it chose."""

    def __init__(self, model: DualAR, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(model, device, dtype)
        c = model.config
        shape = (c.max_seq_len, c.num_codebooks, c.codebook_size)
        self.scores = torch.zeros(shape, device=device)

    def _pick(
        self, scores: Tensor, book: int, noise: Tensor, recent: Tensor, real: Tensor
    ) -> Tensor:
        kept = self.scores[:, book]
        kept.index_copy_(0, self.buffers.position, scores.float().unsqueeze(0))
        return super()._pick(scores, book, noise, recent, real)


@dataclass(frozen=True)
class Decoded:
    scores: Tensor  # (frames, num_codebooks, codebook_size), on the CPU
    codes: Tensor  # (frames, num_codebooks), on the CPU


def decoder(subject: Subject, device: str, captured: bool) -> Probed:
    found = Probed(subject.model, torch.device(device), subject.dtype)
    if captured:
        found.warm_up()
    else:
        with torch.inference_mode():
            found.engine.warm_up()
    return found


def decode(
    probed: Probed, conditions: Tensor, sampling: Sampling, forced: Tensor | None = None
) -> Decoded:
    """``forced``: (frames, num_codebooks) codes that each frame finds before it, whatever was
    chosen; without it the decoder follows its own choices."""
    chosen = []
    for frame, codes in enumerate(probed.decode(conditions, sampling, 1, Work())):
        chosen.append(codes[frame].clone())
        if forced is not None:
            probed.buffers.codes[frame].copy_(forced[frame])
    return Decoded(probed.scores[: len(chosen)].cpu(), torch.stack(chosen).cpu())


def compare(one: Decoded, other: Decoded) -> dict[str, Any]:
    """How far two decodings under the same forced codes differ.

    A codebook's scores are compared as long as both had chosen alike in the frame before it.
    """
    same = one.codes == other.codes
    before = torch.cat([torch.ones_like(same[:, :1]), same[:, :-1]], 1).cumprod(1).bool()
    a, b = one.scores[before], other.scores[before]
    cosine = functional.cosine_similarity(a, b, dim=-1)
    return {
        "scores": before.sum().item(),
        "cosine_least": cosine.min().item(),
        "cosine_mean": cosine.mean().item(),
        "difference_most": (a - b).abs().max().item(),
        "score_most": a.abs().max().item(),
        "chosen_alike": (same & before).sum().item(),
    }


def run(job: Job) -> Rows:
    named = subjects.default_dtype(job)
    exact = subjects.load(job, "voice", job.scale.frames, "float32")
    reference = decode(decoder(exact, job.device, False), exact.conditions, GREEDY)
    yield from _graph_against_eager(job, exact)
    for dtype in ("bfloat16", "float16") if job.on_gpu else ("bfloat16",):
        half = subjects.load(job, "voice", job.scale.frames, dtype)
        if dtype == named:
            yield from _graph_against_eager(job, half)
        probed = decoder(half, job.device, False)
        found = decode(probed, exact.conditions.to(half.dtype), GREEDY, reference.codes)
        yield {
            "table": "fidelity",
            "compared": f"eager {dtype}",
            "with": "eager float32",
            "temperature": 0.0,
            "frames": len(found.codes),
            **compare(found, reference),
        }


def _graph_against_eager(job: Job, subject: Subject) -> Rows:
    """Raises ProofError, when all has been told, where a code differs or scores are not alike."""
    eager = decoder(subject, job.device, captured=False)
    graph = decoder(subject, job.device, captured=True)
    if job.on_gpu and graph.engine.kind != "cuda-graph":
        raise ProofError(f"the graph engine runs {graph.engine.kind}, not graphs")
    dtype, wrong = str(subject.dtype).removeprefix("torch."), []
    for sampling in (GREEDY, WARM):
        free = [decode(d, subject.conditions, sampling) for d in (graph, eager)]
        forced = [decode(d, subject.conditions, sampling, free[1].codes) for d in (graph, eager)]
        equal = int((free[0].codes == free[1].codes).sum())
        found = compare(*forced)
        held = equal == free[0].codes.numel() and found["cosine_least"] >= ALIKE
        row = {
            "table": "fidelity",
            "compared": f"{graph.engine.kind} {dtype}",
            "with": f"eager {dtype}",
            "temperature": sampling.temperature,
            "frames": len(free[0].codes),
            "codes": free[0].codes.numel(),
            "codes_equal": equal,
            **found,
            "held": held,
        }
        yield row
        if not held:
            wrong.append(
                f"{dtype} at temperature {sampling.temperature}: {equal} of {row['codes']} codes "
                f"equal, least cosine {found['cosine_least']:.6f}"
            )
    if wrong:
        raise ProofError(f"graph and eager differ: {'; '.join(wrong)}")
