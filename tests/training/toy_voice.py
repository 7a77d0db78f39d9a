"""A small, complete voice of random weights, for tests that do not depend on its sound."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from training import codec_decoder
from workers.models.voice.codec_decoder import CodecDecoder
from workers.models.voice.dual_ar import DualAR, DualARConfig
from workers.models.voice.g2p import G2P
from workers.models.voice.spectrum import STEPS

CONFIG = DualARConfig(
    n_text_layer=1, n_layer=2, dim=64, n_head=2, n_local_heads=1, head_dim=32, intermediate_size=128
)


def _save(module: nn.Module, path: Path, **metadata: object) -> None:
    tensors = {name: value.contiguous() for name, value in module.state_dict().items()}
    save_file(tensors, path, {name: json.dumps(value) for name, value in metadata.items()})


def write(folder: Path) -> Path:
    """Write the files that ``workers.models.voice.weights.load`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    _save(DualAR(CONFIG), folder / "dual_ar.safetensors", config=CONFIG.to_json())
    _save(G2P(), folder / "g2p.safetensors", chunks=["", "ax", "t", "s iy"])
    book = torch.zeros(CONFIG.codebook_size, 2 * STEPS)
    stats = torch.tensor([5.0, 0.2, 0.6])  # of the logarithm of 150 Hz or so
    save_file({"pitch_book": book, "pitch_stats": stats}, folder / "pitch.safetensors")
    _save(CodecDecoder(), folder / "codec_decoder.safetensors")
    codec_decoder.export(folder)
    (folder / "codec_decoder.safetensors").unlink()
    return folder
