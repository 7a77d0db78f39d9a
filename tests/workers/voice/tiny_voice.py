"""A tiny voice of random weights, in files like the real one's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from workers.models.voice.dual_ar import DualAR, DualARConfig
from workers.models.voice.g2p import G2P
from workers.models.voice.spectrum import STEPS

CONFIG = replace(
    DualARConfig(),
    n_text_layer=1,
    n_layer=2,
    dim=48,
    n_head=4,
    n_local_heads=2,
    head_dim=12,
    intermediate_size=64,
    num_codebooks=5,
    codebook_size=32,
    max_seq_len=300,
)
CHUNKS = ["", "k", "ae1", "t s"]


def tiny_model(seed: int = 0, config: DualARConfig = CONFIG) -> DualAR:
    """Scores far enough apart that rounding decides nothing: a trained network's are, too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DualAR(config).eval()
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.25)
    return model


def tiny_conditions(frames: int, seed: int = 0, config: DualARConfig = CONFIG) -> Tensor:
    """(frames, dim)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(frames, config.dim, generator=generator)


def tiny_files() -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
    """Tensors and metadata of each safetensors file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        g2p = G2P()
    pitch = {
        "pitch_book": torch.zeros(CONFIG.codebook_size, STEPS * 2),
        "pitch_stats": torch.tensor([5.2, 0.2, 1.0]),
    }
    return {
        "dual_ar": (
            dict(tiny_model().state_dict()),
            {"config": json.dumps(CONFIG.to_json())},
        ),
        "g2p": (dict(g2p.state_dict()), {"chunks": json.dumps(CHUNKS)}),
        "pitch": (pitch, {}),
    }


def write_voice(
    folder: Path, files: dict[str, tuple[dict[str, Tensor], dict[str, str]]] | None = None
) -> Path:
    """Write all files; that of the codec's decoder is not a graph."""
    folder.mkdir(exist_ok=True)
    for name, (tensors, metadata) in (files or tiny_files()).items():
        kept = {key: value.contiguous() for key, value in tensors.items()}
        save_file(kept, folder / f"{name}.safetensors", metadata)
    (folder / "codec_decoder.onnx").write_bytes(b"not looked into")
    return folder


@contextmanager
def one_thread() -> Iterator[None]:
    """As workers run: these networks are too small to gain from more, and tests share cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
