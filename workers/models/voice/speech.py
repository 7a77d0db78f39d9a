"""The demo voice: text to samples, streamed while later frames are still being decoded."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.engines.onnx_runtime import OnnxEngine, Options, Profile
from workers.model.contract import Audio, InvalidRequest, SpeechRequest, Work
from workers.models.voice import text
from workers.models.voice.codec_decoder import PITCH_BOOK
from workers.models.voice.decoding import FrameDecoder
from workers.models.voice.excitation import PitchBook, excitation
from workers.models.voice.g2p import phones_of
from workers.models.voice.phones import SIGNS
from workers.models.voice.sampling import Sampling
from workers.models.voice.spectrum import HOP, SAMPLE_RATE, STEPS
from workers.models.voice.timing import timing
from workers.models.voice.weights import DATA, Weights, dtype_of, load

FRAME = HOP * STEPS
"""Samples of one frame."""
CONTEXT = 8
"""Frames on each side of a chunk that the codec's decoder gets as context."""
CHUNKS = (8, 16, 32)
"""Frames of the first, second and every further chunk: audio starts early, then few frames are
decoded twice. The cuts do not depend on streaming, so the samples are the same."""
MIN_STEPS, MAX_STEPS = 1.0, 80.0  # steps of a phone
LONGEST_TEXT = " ".join(["the longest sentence that sizing has to know about"] * 3)

ALLOWED = {"temperature": (0.0, 2.0), "top_p": (0.01, 1.0), "repetition_penalty": (0.5, 2.0)}
"""Settings of a request, with their ranges."""


class Voice:
    """flite's ``slt``, learned by a DualAR decoder; see the model card."""

    sample_rate = SAMPLE_RATE
    voices: ClassVar[list[str]] = ["slt"]

    def __init__(
        self,
        *,
        weights: str | None = None,
        dtype: str | None = None,
        require: str | None = None,
        temperature: float = 0.0,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
    ) -> None:
        """``dtype``: of the DualAR decoder; float32 on a CPU and bfloat16 on a GPU by default.

        ``require``: which provider must run the codec's decoder (``engines.onnx.REQUIREMENTS``).
        The last three are defaults for requests that do not set them.
        """
        self.folder = Path(weights) if weights else DATA
        self.dtype_name, self.require = dtype, require
        self.sampling = _sampling(
            {
                "temperature": temperature,
                "top_p": top_p,
                "repetition_penalty": repetition_penalty,
            }
        )
        self.decoding_seconds = 0.0

    def setup(self, device: str) -> None:
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        self.dtype_name = self.dtype_name or ("bfloat16" if on_gpu else "float32")
        self.weights: Weights = load(self.folder)
        self.decoder = FrameDecoder(self.weights.dual_ar, self.device, dtype_of(self.dtype_name))
        books = self.weights.dual_ar.config.num_codebooks
        frames = (1, CHUNKS[-1] + 2 * CONTEXT, CHUNKS[-1] + 2 * CONTEXT)
        cache = os.environ.get("GPUFARM_CACHE_DIR")
        self.codec = OnnxEngine(
            self.weights.codec_decoder,
            Options(
                device=device,
                require=self.require,
                threads=torch.get_num_threads(),
                cache_dir=Path(cache) / "tensorrt" if cache else None,
                profiles={
                    "codes": Profile(*((1, n, books) for n in frames)),
                    "excitation": Profile(*((1, n * FRAME) for n in frames)),
                },
            ),
        )
        self.g2p = partial(phones_of, self.weights.g2p, self.weights.chunks)
        text.lexicon()

    def warm_up(self) -> None:
        """Capture the graphs and speak once, so that the first request finds everything ready."""
        self.decoder.warm_up()
        for _ in self.speak(SpeechRequest("Ready. " + LONGEST_TEXT, self.voices[0])):
            pass

    def longest_request(self) -> dict[str, Any]:
        return {"path": "/v1/audio/speech", "json": {"input": LONGEST_TEXT, "speed": 0.5}}

    def health(self) -> dict[str, Any]:
        """Report what is in use. Bytes over seconds is the bandwidth that the decoder reached."""
        decoder = self.decoder
        return {
            "device": str(self.device),
            "dtype": self.dtype_name,
            "engine": decoder.engine.kind,
            "provider": self.codec.provider,
            "codec_decoder": self.codec.health(),
            "decoder": {
                "frames": decoder.frames_decoded,
                "bytes_read": decoder.bytes_read,
                "seconds": round(self.decoding_seconds, 3),
            },
            "weights": self.weights.fingerprint,
        }

    def speak(self, request: SpeechRequest) -> Iterator[Audio]:
        """Yield chunks of mono samples in [-1, 1], determined by text, seed and settings."""
        sampling, seed = self._settings(request), request.seed or 0
        with request.work.stage("text"):
            longest = int(text.MAX_SENTENCE_LETTERS * min(1.0, request.speed))
            sentences = text.sentences(request.input, self.g2p, longest)
        for number, sentence in enumerate(sentences):
            own_seed = (seed * 1_000_003 + number) % 2**63
            with request.work.stage("decoder"):
                conditions = self._conditions(sentence, request.speed)
            codes = self._codes(conditions, sampling, own_seed, request.work)
            yield from self.samples(codes, len(conditions), own_seed, request.work)

    def _settings(self, request: SpeechRequest) -> Sampling:
        return _sampling(
            {name: request.extra.get(name, getattr(self.sampling, name)) for name in ALLOWED}
        )

    @torch.inference_mode()
    def _conditions(self, sentence: text.Sentence, speed: float) -> Tensor:
        """Return the conditions of every frame of a sentence: (frames, dim)."""
        model, device = self.weights.dual_ar, self.device
        symbols = torch.tensor([[p.symbol for p in sentence.phones]], device=device)
        sign = torch.tensor([SIGNS.index(sentence.sign)], device=device)
        read = model.read(symbols, sign)
        steps = model.durations(read)[0].float().exp().clamp(MIN_STEPS, MAX_STEPS).cpu() / speed
        max_steps = model.config.max_seq_len * STEPS - 1
        # A slow sentence of long words may be too long: speed it up instead of cutting it off.
        steps *= min(1.0, max_steps / float(steps.sum()))
        placed = timing(torch.cumsum(steps, 0).tolist())
        phone_of = placed.phone_of.unsqueeze(0).to(device)
        places = placed.places.unsqueeze(0).to(device)
        return model.condition(read, phone_of, places)[0]

    def _codes(
        self, conditions: Tensor, sampling: Sampling, seed: int, work: Work
    ) -> Iterator[Tensor]:
        """Yield the frame decoder's output and count its time."""
        frames = self.decoder.decode(conditions, sampling, seed, work)
        while True:
            begun = time.perf_counter()
            with work.stage("decoder"):
                codes = next(frames, None)
            self.decoding_seconds += time.perf_counter() - begun
            if codes is None:
                return
            yield codes

    def samples(
        self, codes: Iterator[Tensor], frames: int, seed: int, work: Work
    ) -> Iterator[Audio]:
        """Yield chunks of samples, given the codes so far after each frame."""
        noise = np.random.default_rng(seed).standard_normal(frames * FRAME, dtype=np.float32)
        start, number = 0, 0
        stop = min(CHUNKS[0], frames)
        for known in codes:
            while start < frames and len(known) >= min(stop + CONTEXT, frames):
                begun = time.perf_counter()
                with work.stage("decoder"):  # frames are queued on the device; this waits for them
                    part = known.cpu().numpy()
                self.decoding_seconds += time.perf_counter() - begun
                with work.stage("codec"):
                    chunk = self._chunk(part, noise, start, stop)
                yield chunk
                number += 1
                start, stop = stop, min(stop + CHUNKS[min(number, len(CHUNKS) - 1)], frames)

    def _chunk(
        self, codes: NDArray[np.int64], noise: NDArray[np.float32], start: int, stop: int
    ) -> Audio:
        """Return the samples of the frames from ``start`` to ``stop``, decoded with context."""
        first, last = max(0, start - CONTEXT), min(len(codes), stop + CONTEXT)
        f0, voicing = self._pitch.contour(codes[:last, PITCH_BOOK])
        source = excitation(f0, voicing, noise[: last * FRAME])[first * FRAME :]
        samples: Audio = self.codec.run(codes=codes[None, first:last], excitation=source[None])[0][
            0
        ]
        return samples[(start - first) * FRAME : (stop - first) * FRAME].clip(-1.0, 1.0)

    @property
    def _pitch(self) -> PitchBook:
        return self.weights.pitch


def _sampling(values: dict[str, Any]) -> Sampling:
    """Check the settings. Raises InvalidRequest naming a value that is not a number in range."""
    for name, (low, high) in ALLOWED.items():
        value = values[name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            raise InvalidRequest(f"{name} = {value!r:.60}: must be a number from {low} to {high}")
    return Sampling(**{name: float(value) for name, value in values.items()})
