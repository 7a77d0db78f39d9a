"""Compare the demo voice's ways of computing: graph and eager, ONNX and torch, half and single.

python -m benchmarks.fidelity [--device cpu|cuda:0] [--json]

Each comparison reports its number of vectors, the least and the mean cosine between them, and the
largest difference of two values. The exit code is 1 when a least cosine is below the one that the
comparison requires, or when a graph chose another code than eager execution.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.report import columns
from benchmarks.scores import (
    Decoded,
    RecordingDecoder,
    compare,
    decode,
    joined,
    whole_sentence,
)
from workers.engines.onnx_runtime import ProviderError
from workers.model.contract import Work
from workers.models.voice import text
from workers.models.voice.codec_decoder import CodecDecoder
from workers.models.voice.dual_ar import DualAR
from workers.models.voice.phones import SIGNS
from workers.models.voice.sampling import Sampling
from workers.models.voice.speech import Voice
from workers.models.voice.weights import DATA, WeightsError, dtype_of

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Would you rather walk to the station, or wait here until the rain is over?",
    "She sold nine hundred and forty two boxes of apples before the end of the summer!",
)
REORDERED = 0.9999
"""Least cosine for the same arithmetic in another order."""
OTHER_KERNELS = 0.999
"""Least cosine for another library's kernels, over samples."""
HALF = {"bfloat16": 0.998, "float16": 0.9999}
"""Least cosine for half precision."""
GREEDY = Sampling(temperature=0.0)
WARM = Sampling(temperature=0.8)


@dataclass(frozen=True)
class Row:
    """One comparison, or the reason why it was skipped."""

    compared: str
    against: str
    of: str
    """Contents of a vector."""
    n: int = 0
    """Number of vectors."""
    cosine_least: float | None = None
    cosine_mean: float | None = None
    difference_most: float | None = None
    required: float = 0.0
    """Lower bound of the least cosine."""
    skipped: str = ""
    codes: int = 0
    """Codes that two decoders chose, each following its own choices; all have to be equal."""
    codes_equal: int = 0

    @property
    def holds(self) -> bool:
        return bool(self.skipped) or (
            self.cosine_least is not None
            and self.cosine_least >= self.required
            and self.codes_equal == self.codes
        )


@dataclass(frozen=True)
class Reference:
    """A sentence decoded in single precision, step by step, eagerly."""

    symbols: Tensor  # (1, phones)
    sign: Tensor  # (1,)
    conditions: Tensor  # (frames, dim)
    decoded: Decoded


class TorchCodec:
    """The codec's decoder in torch on the CPU, called like the ONNX engine."""

    def __init__(self, network: CodecDecoder) -> None:
        self.network = network.eval()

    @torch.no_grad()
    def run(self, *, codes: np.ndarray, excitation: np.ndarray) -> list[np.ndarray]:
        return [self.network(torch.from_numpy(codes), torch.from_numpy(excitation)).numpy()]


def decoder_of(
    model: DualAR, device: torch.device, dtype: str, captured: bool = False
) -> RecordingDecoder:
    """Make a decoder over a copy of ``model``, ``captured`` into graphs if the device has them."""
    decoder = RecordingDecoder(copy.deepcopy(model), device, dtype_of(dtype))
    if captured:
        decoder.warm_up()
    return decoder


def decode_references(voice: Voice, sentences: tuple[str, ...] = SENTENCES) -> list[Reference]:
    """Decode the sentences as references; ``voice`` must be in single precision."""
    model, references = voice.weights.dual_ar, []
    reference = decoder_of(model, voice.device, "float32")
    for sentence in text.sentences(" ".join(sentences), voice.g2p):
        conditions = voice._conditions(sentence, 1.0)
        references.append(
            Reference(
                torch.tensor([[phone.symbol for phone in sentence.phones]], device=voice.device),
                torch.tensor([SIGNS.index(sentence.sign)], device=voice.device),
                conditions,
                decode(reference, conditions, GREEDY),
            )
        )
    return references


def forced(
    decoder: RecordingDecoder,
    conditions: list[Tensor],
    codes: list[Tensor],
    sampling: Sampling = GREEDY,
) -> Decoded:
    """Decode every sentence with its ``codes`` as the context of each frame."""
    pairs = zip(conditions, codes, strict=True)
    return joined(
        [decode(decoder, c.to(decoder.dtype), sampling, k.to(decoder.device)) for c, k in pairs]
    )


def compare_scores(
    compared: str, against: str, one: Decoded, other: Decoded, required: float
) -> Row:
    found = compare(one, other)
    return Row(
        compared,
        against,
        "scores of a codebook",
        found.scores,
        found.cosine_least,
        found.cosine_mean,
        found.difference_most,
        required,
    )


def compare_vectors(
    names: tuple[str, str, str], one: list[Tensor], other: list[Tensor], required: float
) -> Row:
    """Compare vectors pairwise; ``names``: compared, against and contents of a vector."""
    pairs = list(zip(one, other, strict=True))
    cosine = torch.stack([functional.cosine_similarity(a, b, dim=0) for a, b in pairs])
    return Row(
        *names,
        len(pairs),
        float(cosine.min()),
        float(cosine.mean()),
        max(float((a - b).abs().max()) for a, b in pairs),
        required,
    )


def graph_against_eager(
    model: DualAR, device: torch.device, dtype: str, conditions: list[Tensor]
) -> Iterator[Row]:
    """Compare captured and eager decoding of (frames, dim) each, greedy and sampled.

    Codes are compared where each decoder follows its own choices, scores where both get the
    codes of the eager one.
    """
    graph, eager = (decoder_of(model, device, dtype, captured) for captured in (True, False))
    for sampling in (GREEDY, WARM):
        free = [
            [decode(decoder, c.to(decoder.dtype), sampling).codes for c in conditions]
            for decoder in (graph, eager)
        ]
        scores = [forced(decoder, conditions, free[1], sampling) for decoder in (graph, eager)]
        names = [
            f"{kind} {dtype} at temperature {sampling.temperature:g}"
            for kind in (graph.engine.kind, "eager")
        ]
        equal = torch.cat(free[0]) == torch.cat(free[1])
        yield replace(
            compare_scores(names[0], names[1], scores[0], scores[1], REORDERED),
            codes=equal.numel(),
            codes_equal=int(equal.sum()),
        )


def graphs(voice: Voice, references: list[Reference]) -> Iterator[Row]:
    if voice.device.type != "cuda":
        yield Row("graph", "eager", "scores of a codebook", skipped="no graphs on a CPU")
        return
    conditions = [s.conditions for s in references]
    for dtype in ("float32", "bfloat16"):
        yield from graph_against_eager(voice.weights.dual_ar, voice.device, dtype, conditions)


def steps(voice: Voice, references: list[Reference]) -> Iterator[Row]:
    model, complete = voice.weights.dual_ar, []
    for s in references:
        scores = whole_sentence(model, s.conditions, s.decoded.codes.to(voice.device)).cpu()
        complete.append(Decoded(scores, scores.argmax(-1)))
    stepped = joined([s.decoded for s in references])
    yield compare_scores("step by step", "whole sentence", stepped, joined(complete), REORDERED)


def halves(voice: Voice, references: list[Reference]) -> Iterator[Row]:
    model = voice.weights.dual_ar
    reference = joined([s.decoded for s in references])
    conditions, codes = [s.conditions for s in references], [s.decoded.codes for s in references]
    for dtype, required in HALF.items():
        decoder = decoder_of(model, voice.device, dtype)
        names = (f"eager {dtype}", "eager float32")
        yield compare_scores(*names, forced(decoder, conditions, codes), reference, required)
        phones = [
            [
                phone
                for s in references
                for phone in reader.read(s.symbols, s.sign)[0].detach().float()
            ]
            for reader in (decoder.model, model)
        ]
        yield compare_vectors((*names, "a phone as it is read"), phones[0], phones[1], required)


def codec_in_torch(path: Path) -> CodecDecoder:
    """The network that ``path`` was exported from, rebuilt from the graph's constants.

    Raises LookupError if a constant or the ``onnx`` package is missing.
    """
    try:
        # Optional: only this comparison reads a graph's constants.
        onnx: Any = importlib.import_module("onnx")
    except ModuleNotFoundError:
        raise LookupError("the onnx package is not installed") from None
    constants = {
        constant.name: torch.from_numpy(onnx.numpy_helper.to_array(constant).copy())
        for constant in onnx.load(path).graph.initializer
    }
    try:
        books, size = constants["mel_books"].shape[0], constants["pitch_book"].shape[0]
        blocks = sum(name.endswith("near.weight") for name in constants)
        width = constants["enter.weight"].shape[0]
        network = CodecDecoder(books // size + 1, size, width, blocks)
        # The graph holds no scale of the pitch: the excitation made with it is an input.
        state = {"pitch_stats": network.pitch_stats}
        state |= {name: constants[name] for name in network.state_dict().keys() - state.keys()}
    except KeyError as missing:
        raise LookupError(f"{path.name} has no constant named {missing}") from None
    network.load_state_dict(state)
    return network


def codecs(voice: Voice, references: list[Reference]) -> Iterator[Row]:
    engine = voice.codec
    names = (f"ONNX on {engine.provider}", "torch on cpu", "a chunk of samples")
    try:
        network = codec_in_torch(voice.weights.codec_decoder)
    except LookupError as reason:
        yield Row(*names, skipped=str(reason))
        return
    chunks_of: list[list[Tensor]] = []
    for codec in (engine, TorchCodec(network)):
        voice.codec = codec  # type: ignore[assignment]
        chunks = [
            torch.from_numpy(chunk)
            for seed, s in enumerate(references)
            for chunk in voice.samples(iter([s.decoded.codes]), len(s.decoded.codes), seed, Work())
        ]
        chunks_of.append(chunks)
    voice.codec = engine
    yield compare_vectors(names, chunks_of[0], chunks_of[1], OTHER_KERNELS)


def measure(voice: Voice) -> Iterator[Row]:
    """Run all comparisons; ``voice`` must be set up in single precision."""
    references = decode_references(voice)
    for part in (graphs, steps, codecs, halves):
        yield from part(voice, references)


def table(rows: list[Row]) -> str:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return columns(
        [
            {
                "compared": row.compared,
                "with": row.against,
                "vector": row.of,
                "n": str(row.n),
                "least cosine": number(row.cosine_least, ".6f"),
                "mean cosine": number(row.cosine_mean, ".6f"),
                "largest difference": number(row.difference_most, ".3g"),
                "codes equal": f"{row.codes_equal}/{row.codes}" if row.codes else "",
                "required": "" if row.skipped else f"{row.required:g}",
                "holds": row.skipped or ("yes" if row.holds else "NO"),
            }
            for row in rows
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fidelity", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--weights", type=Path, default=DATA, help="the voice's folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as workers run
    voice = Voice(weights=str(args.weights), dtype="float32", require="any")
    try:
        voice.setup(args.device)
    except (WeightsError, ProviderError, OSError, RuntimeError, AssertionError) as error:
        print(f"fidelity: {' '.join(str(error).split())[:500]}", file=sys.stderr)
        return 2
    rows = list(measure(voice))
    holds = all(row.holds for row in rows)
    if args.json:
        on_gpu = voice.device.type == "cuda"
        report = {
            "device": torch.cuda.get_device_name(voice.device) if on_gpu else "cpu",
            "torch": torch.__version__,
            "provider": voice.codec.health(),
            "weights": voice.weights.fingerprint,
            "holds": holds,
            "rows": [{**asdict(row), "holds": row.holds} for row in rows],
        }
        print(json.dumps(report, indent=2))
    else:
        print(table(rows))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
