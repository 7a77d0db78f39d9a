"""The voice's files: read without pickle, and refused unless every key is the one expected."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from workers.voice.dual_ar import DualAR, DualARConfig
from workers.voice.excitation import PitchBook
from workers.voice.spelling import Spelling

DATA = Path(__file__).with_name("data")
FILES = ("dual_ar.safetensors", "codec_decoder.onnx", "pitch.safetensors", "spelling.safetensors")


class WeightsError(ValueError):
    """A file of the voice is missing or is not what this version expects."""


@dataclass(frozen=True)
class Weights:
    dual_ar: DualAR
    pitch: PitchBook
    spelling: Spelling
    chunks: list[str]
    codec_decoder: Path
    fingerprint: str
    """Of all files: the same weights, the same fingerprint."""


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one safetensors file. Raises WeightsError."""
    try:
        with safe_open(path, framework="pt") as opened:
            names = list(opened.keys())
            return {name: opened.get_tensor(name) for name in names}, opened.metadata() or {}
    except OSError as error:
        raise WeightsError(
            f"{path}: {error.strerror or error}; is the voice's folder whole?"
        ) from None
    except Exception as error:  # safetensors raises an exception type of its own
        raise WeightsError(f"{path}: not a safetensors file ({error})") from None


def fill(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load with every key and shape accounted for; raises WeightsError naming the others."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = [
        *(f"{name} is missing" for name in sorted(expected.keys() - found.keys())),
        *(f"{name} is unexpected" for name in sorted(found.keys() - expected.keys())),
        *(
            f"{name} is {found[name]}, {expected[name]} is expected"
            for name in sorted(expected.keys() & found.keys())
            if expected[name] != found[name]
        ),
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise WeightsError(f"{path}: {'; '.join(wrong[:5])}{more}")
    dtype = next(module.parameters()).dtype
    module.load_state_dict({name: value.to(dtype) for name, value in tensors.items()}, strict=True)


def load(folder: Path = DATA) -> Weights:
    """Raises WeightsError; the message names the file and what is wrong with it."""
    digest = hashlib.sha256()
    for name in FILES:
        try:
            digest.update((folder / name).read_bytes())
        except OSError as error:
            raise WeightsError(
                f"{folder / name}: {error.strerror}; the voice needs {', '.join(FILES)} there"
            ) from None
    path = folder / "dual_ar.safetensors"
    tensors, metadata = read(path)
    try:
        config = DualARConfig.from_json(json.loads(metadata["config"]))
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path}: its header has no configuration that fits: {error}") from None
    model = DualAR(config)
    fill(model, tensors, path)

    path = folder / "spelling.safetensors"
    tensors, metadata = read(path)
    spelling = Spelling()
    fill(spelling, tensors, path)
    chunks = json.loads(metadata["chunks"])

    tensors, _ = read(folder / "pitch.safetensors")
    mean, std, weight = tensors["pitch_stats"].tolist()
    pitch = PitchBook(tensors["pitch_book"].numpy(), mean, std, weight)
    return Weights(
        model.eval(),
        pitch,
        spelling.eval(),
        chunks,
        folder / "codec_decoder.onnx",
        digest.hexdigest()[:16],
    )


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def dtype_of(name: str) -> torch.dtype:
    """``float32``, ``bfloat16`` or ``float16``. Raises ValueError."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f'dtype = "{name}" is unknown; use one of {", ".join(known)}')
    return known[name]
