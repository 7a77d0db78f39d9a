"""Loading of the voice's files: without pickle, and only with exactly the expected keys."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from workers.models.voice.dual_ar import DualAR, DualARConfig
from workers.models.voice.excitation import PitchBook
from workers.models.voice.g2p import G2P, MAX_CHUNKS
from workers.models.voice.phones import NUM_SYMBOLS, PHONE_ID
from workers.models.voice.spectrum import STEPS

DATA = Path(__file__).with_name("data")
FILES = ("dual_ar.safetensors", "codec_decoder.onnx", "pitch.safetensors", "g2p.safetensors")

Shape = tuple[int, ...]


class WeightsError(ValueError):
    """A file of the voice is missing or is not what this version expects."""


@dataclass(frozen=True)
class Weights:
    dual_ar: DualAR
    pitch: PitchBook
    g2p: G2P
    chunks: list[str]
    codec_decoder: Path
    fingerprint: str
    """Hash of all files."""


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of one safetensors file. Raises WeightsError."""
    try:
        with safe_open(path, framework="pt") as opened:
            names = list(opened.keys())
            return {name: opened.get_tensor(name) for name in names}, opened.metadata() or {}
    except OSError as error:
        raise WeightsError(
            f"{path}: {error.strerror or error}; check that the voice's folder is complete"
        ) from None
    except Exception as error:  # safetensors raises an exception type of its own
        raise WeightsError(f"{path}: not a safetensors file ({error})") from None


def check(found: dict[str, Shape], expected: dict[str, Shape], path: Path) -> None:
    """Raise WeightsError naming the keys that are missing, unexpected or of another shape."""
    wrong = [
        *(f"{name} is missing" for name in sorted(expected.keys() - found.keys())),
        *(f"{name} is unexpected" for name in sorted(found.keys() - expected.keys())),
        *(
            f"{name} has shape {found[name]}, expected {expected[name]}"
            for name in sorted(expected.keys() & found.keys())
            if expected[name] != found[name]
        ),
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise WeightsError(f"{path}: {'; '.join(wrong[:5])}{more}")


def fill(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load tensors into a module; raises WeightsError unless keys and shapes match exactly."""
    check(_shapes(tensors), _shapes(module.state_dict()), path)
    dtype = next(module.parameters()).dtype
    module.load_state_dict({name: value.to(dtype) for name, value in tensors.items()}, strict=True)


def _shapes(tensors: dict[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def load(folder: Path = DATA) -> Weights:
    """Load all files. Raises WeightsError naming the file and what is wrong with it."""
    digest = hashlib.sha256()
    for name in FILES:
        try:
            digest.update((folder / name).read_bytes())
        except OSError as error:
            raise WeightsError(
                f"{folder / name}: {error.strerror}; the voice needs {', '.join(FILES)} there"
            ) from None
    model = _dual_ar(folder / "dual_ar.safetensors")
    g2p, chunks = _g2p(folder / "g2p.safetensors")
    pitch = _pitch(folder / "pitch.safetensors", model.config.codebook_size)
    graph = folder / "codec_decoder.onnx"
    return Weights(model, pitch, g2p, chunks, graph, digest.hexdigest()[:16])


def _dual_ar(path: Path) -> DualAR:
    tensors, metadata = read(path)
    try:
        config = _config(json.loads(metadata["config"]))
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path}: header has no valid configuration: {error}") from None
    model = DualAR(config)
    fill(model, tensors, path)
    return model.eval()


def _config(values: Any) -> DualARConfig:
    """Check a configuration. Raises ValueError unless it can be built and fits the text."""
    if not isinstance(values, dict):
        raise ValueError("it must be a JSON object")
    config = DualARConfig.from_json(values)
    for name, value in values.items():
        whole = isinstance(getattr(DualARConfig, name), int)
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise ValueError(
                f"{name} must be {'an integer' if whole else 'a number'}, got {value!r}"
            )
        if value < 0 or (value == 0 and name != "dropout"):
            raise ValueError(f"{name} must be positive, got {value!r}")
    if config.n_head % config.n_local_heads or config.head_dim % 2:
        raise ValueError(
            f"n_head = {config.n_head} must be a multiple of n_local_heads = "
            f"{config.n_local_heads}, and head_dim = {config.head_dim} even"
        )
    if config.vocab_size != NUM_SYMBOLS:
        raise ValueError(f"vocab_size must be {NUM_SYMBOLS}, got {config.vocab_size}")
    return config


def _g2p(path: Path) -> tuple[G2P, list[str]]:
    tensors, metadata = read(path)
    network = G2P()
    fill(network, tensors, path)
    try:
        chunks = json.loads(metadata["chunks"])
    except (KeyError, ValueError):
        raise WeightsError(f"{path}: header has no valid list of chunks") from None
    if (
        not isinstance(chunks, list)
        or not 0 < len(chunks) <= MAX_CHUNKS
        or not all(isinstance(chunk, str) for chunk in chunks)
    ):
        raise WeightsError(f"{path}: chunks must be a list of 1 to {MAX_CHUNKS} strings")
    unknown = {
        phone for chunk in chunks for phone in chunk.split() if phone.rstrip("1") not in PHONE_ID
    }
    if unknown:
        raise WeightsError(
            f"{path}: chunks contain unknown phones: {', '.join(sorted(unknown)[:5])}"
        )
    return network.eval(), chunks


def _pitch(path: Path, codebook_size: int) -> PitchBook:
    tensors, _ = read(path)
    expected = {"pitch_book": (codebook_size, STEPS * 2), "pitch_stats": (3,)}
    check(_shapes(tensors), expected, path)
    mean, std, weight = tensors["pitch_stats"].tolist()
    return PitchBook(tensors["pitch_book"].float().numpy(), mean, std, weight)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype ``float32``, ``bfloat16`` or ``float16``. Raises ValueError."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f'dtype is unknown: "{name}"; use one of {", ".join(known)}')
    return known[name]
