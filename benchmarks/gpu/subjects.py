"""What is measured: the demo voice's decoder, and one large enough to be bound by memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.job import Job
from workers.models.voice import text as written
from workers.models.voice.dual_ar import DualAR, DualARConfig
from workers.models.voice.sampling import Sampling
from workers.models.voice.speech import LONGEST_TEXT, Voice
from workers.models.voice.weights import dtype_of, parameters

GREEDY = Sampling(temperature=0.0)
LARGE = DualARConfig(
    n_text_layer=1,
    n_layer=28,
    dim=1024,
    n_head=16,
    n_local_heads=8,
    head_dim=128,
    intermediate_size=3072,
    n_fast_layer=4,
    num_codebooks=10,
    codebook_size=1024,
)
"""Half a billion parameters: the size of systems that are served in earnest. The demo voice's
weights fit into a large GPU's cache, so its decoder says little about memory."""


@dataclass(frozen=True)
class Subject:
    name: str
    model: DualAR
    conditions: Tensor
    """(frames, dim), of the model's dtype, on the device."""
    dtype: torch.dtype
    fingerprint: str
    """Of the weights; ``random`` where they are."""

    @property
    def parameters(self) -> int:
        return parameters(self.model)


def default_dtype(job: Job) -> str:
    return "bfloat16" if job.on_gpu else "float32"


@torch.no_grad()
def load(job: Job, name: str, frames: int, dtype: str | None = None) -> Subject:
    """``voice``: the demo voice, saying a sentence again and again until there are ``frames``.

    ``large``: LARGE with random weights. Raises ValueError for any other name.
    """
    if name not in {"voice", "large"}:
        raise ValueError(f"no model is called {name!r}: it is voice or large")
    named = dtype or default_dtype(job)
    if name == "large":
        torch.manual_seed(1)
        with torch.device(job.device):
            network = DualAR(LARGE).eval().to(dtype_of(named))
            conditions = torch.randn(frames, LARGE.dim, dtype=dtype_of(named))
        if job.on_gpu:
            torch.cuda.empty_cache()  # it was made in single precision
        return Subject(name, network, conditions, dtype_of(named), "random")
    voice = whole_voice(job, named)
    (first, *_) = written.sentences(LONGEST_TEXT, voice.spell)
    said = voice._conditions(first, 1.0)
    again = torch.arange(frames, device=said.device) % len(said)
    return Subject(
        name, voice.weights.dual_ar, said[again], dtype_of(named), voice.weights.fingerprint
    )


def whole_voice(job: Job, dtype: str | None = None) -> Voice:
    """Any provider will do for the codec: which one it is, is told and not required."""
    voice = Voice(weights=str(Path(job.weights)), dtype=dtype, require="any")
    voice.setup(job.device)
    return voice
