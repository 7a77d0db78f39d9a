"""Train the network that smooths dequantised codes, and export the codec's decoder to ONNX.

python -m training.codec_decoder --out build/voice --steps 1000
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training import recipe
from workers.models.voice.codec_decoder import CodecDecoder
from workers.models.voice.spectrum import HOP, STEPS

FRAMES = 32  # of a training segment
MARGIN = 4  # frames at each end that the loss does not see


def load_codec(folder: Path) -> CodecDecoder:
    """Make an untrained decoder with the quantiser's codebooks."""
    decoder = CodecDecoder()
    quantiser = load_file(recipe.input_file(folder, "quantiser.safetensors"))
    quantiser["mel_books"] = quantiser["mel_books"].flatten(0, 1)
    _, unexpected = decoder.load_state_dict(quantiser, strict=False)
    assert not unexpected, unexpected
    return decoder


class Segments:
    """Random segments of the corpus: codes and their original spectrogram."""

    def __init__(self, folder: Path, decoder: CodecDecoder, seed: int) -> None:
        with np.load(recipe.input_file(folder, "codes.npz")) as data:
            self.codes, counts = torch.from_numpy(data["codes"]).long(), data["counts"]
        with np.load(recipe.input_file(folder, "features.npz")) as data:
            self.mel = torch.from_numpy(data["mel"])
            lengths = [line["steps"] for line in json.loads(str(data["lines"]))]
        self.first_frame = np.concatenate([[0], np.cumsum(counts)[:-1]])
        self.first_step = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        self.frames = np.array(lengths) // STEPS
        self.long_enough = np.flatnonzero(self.frames >= FRAMES)
        self.rng = np.random.default_rng(seed)
        self.decoder = decoder

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        codes, mels = [], []
        for sentence in self.rng.choice(self.long_enough, size):
            at = int(self.rng.integers(0, self.frames[sentence] - FRAMES + 1))
            frame, step = self.first_frame[sentence] + at, self.first_step[sentence] + at * STEPS
            codes.append(self.codes[frame : frame + FRAMES])
            mels.append(self.mel[step : step + FRAMES * STEPS].float())
        normal = (torch.stack(mels) - self.decoder.mel_mean) / self.decoder.mel_scale
        return torch.stack(codes), normal


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    decoder = load_codec(args.out)
    segments = Segments(args.out, decoder, args.seed)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=args.rate, betas=(0.9, 0.98))
    inner = slice(MARGIN * STEPS, -MARGIN * STEPS)
    begun, before, after, log = time.monotonic(), 0.0, 0.0, []
    for step in range(1, args.steps + 1):
        rate = args.rate * min(1, step / 50) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate + 1e-5
        codes, real = segments.batch(args.batch)
        loss = (decoder.spectrogram(codes) - real)[:, inner].square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after += float(loss.detach())
        before += float((decoder.dequantise(codes)[0] - real)[:, inner].square().mean())
        if step % 100 == 0:
            pace = (time.monotonic() - begun) / step
            log.append({"step": step, "left": round(after / 100, 5), "of": round(before / 100, 5)})
            print(f"{log[-1]}, {pace:.2f} s a step", flush=True)
            before = after = 0.0
    weights = {k: v.contiguous() for k, v in decoder.state_dict().items()}
    metadata = {"training": json.dumps({"seed": args.seed, "log": log})}
    save_file(weights, args.out / "codec_decoder.safetensors", metadata)


def export(folder: Path) -> None:
    """Write ``codec_decoder.onnx``: inputs codes and excitation, any number of frames."""
    decoder = CodecDecoder()
    decoder.load_state_dict(load_file(recipe.input_file(folder, "codec_decoder.safetensors")))
    decoder.eval()
    codes = torch.zeros(1, 8, decoder.book_offsets.numel() + 1, dtype=torch.int64)
    excitation = torch.randn(1, 8 * STEPS * HOP)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            decoder,
            (codes, excitation),
            str(folder / "codec_decoder.onnx"),
            input_names=["codes", "excitation"],
            output_names=["samples"],
            dynamic_axes={
                "codes": {1: "frames"},
                "excitation": {1: "samples"},
                "samples": {1: "samples"},
            },
            opset_version=17,
            dynamo=False,
        )
    share_constants(folder / "codec_decoder.onnx")


def share_constants(path: Path) -> None:
    """Merge equal constants, which the exporter writes once for each use."""
    model = onnx.load(path)
    for node in list(model.graph.node):
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            model.graph.initializer.add().CopyFrom(node.attribute[0].t)
            model.graph.initializer[-1].name = node.output[0]
            model.graph.node.remove(node)
    kept: dict[bytes, str] = {}
    renamed: dict[str, str] = {}
    for constant in list(model.graph.initializer):
        nameless = onnx.TensorProto()
        nameless.CopyFrom(constant)
        nameless.name = ""
        first = kept.setdefault(nameless.SerializeToString(), constant.name)
        if first != constant.name:
            renamed[constant.name] = first
            model.graph.initializer.remove(constant)
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
    onnx.checker.check_model(model)
    onnx.save(model, path)


@recipe.step()
def main() -> None:
    parser = recipe.parser(__doc__)
    parser.add_argument("--steps", type=recipe.non_negative, default=1000, help="0 only exports")
    parser.add_argument("--batch", type=recipe.count, default=24)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=recipe.count, default=torch.get_num_threads())
    args = parser.parse_args()
    if args.steps:
        train(args)
    export(args.out)


if __name__ == "__main__":
    main()
