"""Decodings of the demo voice that keep their scores, and the difference between two of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from workers.model.contract import Work
from workers.models.voice.decoding import FrameDecoder
from workers.models.voice.dual_ar import DualAR
from workers.models.voice.sampling import Sampling


class RecordingDecoder(FrameDecoder):
    """A decoder that keeps the scores from which it chooses."""

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
    """Frames with the scores of their codes."""

    scores: Tensor  # (frames, num_codebooks, codebook_size), on the CPU
    codes: Tensor  # (frames, num_codebooks), on the CPU


@dataclass(frozen=True)
class Difference:
    """How far the scores of two decodings differ, codebook by codebook."""

    scores: int
    """Codebooks of a frame that are compared."""
    cosine_least: float
    cosine_mean: float
    difference_most: float


def decode(
    decoder: RecordingDecoder,
    conditions: Tensor,
    sampling: Sampling,
    forced: Tensor | None = None,
) -> Decoded:
    """Decode (frames, dim); the result is not overwritten by the decoder's next sentence.

    ``forced``: (frames, num_codebooks) codes that replace the chosen ones as the context of the
    next frame; without it the decoder follows its own choices.
    """
    chosen = []
    for frame, codes in enumerate(decoder.decode(conditions, sampling, 1, Work())):
        chosen.append(codes[frame].clone())
        if forced is not None:
            decoder.buffers.codes[frame].copy_(forced[frame])
    return Decoded(decoder.scores[: len(chosen)].cpu().clone(), torch.stack(chosen).cpu())


def joined(parts: list[Decoded]) -> Decoded:
    """The frames of several sentences, one after the other."""
    return Decoded(torch.cat([p.scores for p in parts]), torch.cat([p.codes for p in parts]))


def compare(one: Decoded, other: Decoded) -> Difference:
    """Compare two decodings under the same forced codes.

    A codebook's scores depend on the codes chosen before it in the same frame, so a frame is
    compared up to and including its first codebook in which the two chose differently.
    """
    same = one.codes == other.codes
    comparable = torch.cat([torch.ones_like(same[:, :1]), same[:, :-1]], 1).cumprod(1).bool()
    a, b = one.scores[comparable], other.scores[comparable]
    cosine = functional.cosine_similarity(a, b, dim=-1)
    return Difference(
        int(comparable.sum()),
        float(cosine.min()),
        float(cosine.mean()),
        float((a - b).abs().max()),
    )


@torch.no_grad()
def whole_sentence(model: DualAR, conditions: Tensor, codes: Tensor) -> Tensor:
    """Score all frames at once, as in training, each given the codes before it.

    (frames, dim) and (frames, num_codebooks) -> (frames, num_codebooks, codebook_size).
    """
    known = functional.pad(model.embed_codes(codes[:-1]), (0, 0, 1, 0))
    hidden = model.slow((conditions + known).unsqueeze(0))[0]
    return torch.cat([model.output(hidden).unsqueeze(1), model.fast(hidden, codes)], dim=1)
