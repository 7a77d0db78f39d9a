"""The models that are measured: the demo voice's decoder, and one bound by memory bandwidth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.job import Job
from workers.models.voice import text
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
"""Half a billion parameters, as production systems have. The demo voice's weights fit into a large
GPU's cache, so its decoder says little about memory bandwidth."""


@dataclass(frozen=True)
class Subject:
    name: str
    model: DualAR
    conditions: Tensor
    """(frames, dim), of the model's dtype, on the device."""
    dtype: torch.dtype
    fingerprint: str
    """Of the weights; ``random`` for random ones."""

    @property
    def parameters(self) -> int:
        return parameters(self.model)


def default_dtype(job: Job) -> str:
    return "bfloat16" if job.on_gpu else "float32"


@torch.no_grad()
def load(job: Job, name: str, frames: int, dtype: str | None = None) -> Subject:
    """Load a model. ``voice``: the demo voice, repeating a sentence until there are ``frames``.

    ``large``: LARGE with random weights. Raises ValueError for any other name.
    """
    if name not in {"voice", "large"}:
        raise ValueError(f"unknown model: {name!r}; use voice or large")
    named = dtype or default_dtype(job)
    if name == "large":
        torch.manual_seed(1)
        with torch.device(job.device):
            network = DualAR(LARGE).eval().to(dtype_of(named))
            conditions = torch.randn(frames, LARGE.dim, dtype=dtype_of(named))
        if job.on_gpu:
            torch.cuda.empty_cache()  # it was created in single precision
        return Subject(name, network, conditions, dtype_of(named), "random")
    voice = load_voice(job, named)
    (first, *_) = text.sentences(LONGEST_TEXT, voice.g2p)
    spoken = voice._conditions(first, 1.0)
    repeated = torch.arange(frames, device=spoken.device) % len(spoken)
    return Subject(
        name, voice.weights.dual_ar, spoken[repeated], dtype_of(named), voice.weights.fingerprint
    )


def load_voice(job: Job, dtype: str | None = None) -> Voice:
    """Load the complete voice; the provider of its codec is reported, not required."""
    voice = Voice(weights=str(Path(job.weights)), dtype=dtype, require="any")
    voice.setup(job.device)
    return voice
