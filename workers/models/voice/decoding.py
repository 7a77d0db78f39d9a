"""A sentence's codes, a frame at a time: DualAR's step over static buffers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.engines.cuda_graph import GraphEngine
from workers.model.contract import Work
from workers.models.voice.dual_ar import Block, DualAR, KVCache
from workers.models.voice.sampling import (
    MIN_TEMPERATURE,
    PENALTY_WINDOW,
    Sampling,
    choose,
    draw_noise,
    penalise,
)

BUCKETS = (128, 256, 512, 1024)


@dataclass
class Buffers:
    """Everything a frame's step reads and writes; the addresses never change."""

    position: Tensor  # (1,) int64: the frame to be decoded
    conditions: Tensor  # (max_seq_len, dim)
    noise: Tensor  # (max_seq_len, num_codebooks, codebook_size)
    codes: Tensor  # (max_seq_len, num_codebooks) int64
    temperature: Tensor  # ()
    top_p: Tensor  # ()
    repetition_penalty: Tensor  # ()
    slow: list[KVCache]
    fast: list[KVCache]

    @classmethod
    def allocate(cls, model: DualAR, device: torch.device, dtype: torch.dtype) -> Buffers:
        c = model.config

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        return cls(
            position=zeros(1, dtype=torch.int64),
            conditions=zeros(c.max_seq_len, c.dim, dtype=dtype),
            noise=zeros(c.max_seq_len, c.num_codebooks, c.codebook_size) + 1,
            codes=zeros(c.max_seq_len, c.num_codebooks, dtype=torch.int64),
            temperature=zeros() + 1,
            top_p=zeros() + 1,
            repetition_penalty=zeros() + 1,
            slow=[KVCache.empty(c, c.max_seq_len, device, dtype) for _ in range(c.n_layer)],
            fast=[KVCache.empty(c, c.num_codebooks, device, dtype) for _ in range(c.n_fast_layer)],
        )


class FrameDecoder:
    """Decodes sentences one after another, in one thread and for one request at a time."""

    def __init__(self, model: DualAR, device: torch.device, dtype: torch.dtype) -> None:
        self.model = model.to(device=device, dtype=dtype).eval()
        self.device, self.dtype = device, dtype
        self.buffers = Buffers.allocate(self.model, device, dtype)
        longest = model.config.max_seq_len
        sizes = [size for size in BUCKETS if size < longest] + [longest]
        self.engine = GraphEngine(self._step, sizes, device)
        self.frames_decoded = 0
        self.bytes_read = 0
        self._weight_bytes = self._weights_read()
        self._places = torch.arange(longest, device=device)
        self._fast_at = torch.arange(model.config.num_codebooks, device=device)
        self._back = torch.arange(1, PENALTY_WINDOW + 1, device=device)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run and, on CUDA, capture every bucket."""
        self.engine.warm_up()
        self.engine.capture()
        self.buffers.position.zero_()

    @torch.inference_mode()
    def decode(
        self, conditions: Tensor, sampling: Sampling, seed: int, work: Work
    ) -> Iterator[Tensor]:
        """Decode (frames, dim); yield the codes so far after each frame, (frames, num_codebooks).

        The tensors are views of the buffer. Raises Cancelled between two frames when the client
        has disconnected, and ValueError for more than max_seq_len frames.
        """
        b, frames, max_frames = self.buffers, len(conditions), self.model.config.max_seq_len
        if frames > max_frames:
            raise ValueError(
                f"sentence has too many frames: {frames}; split the text below {max_frames}"
            )
        b.conditions[:frames].copy_(conditions)
        if (
            sampling.temperature > MIN_TEMPERATURE
        ):  # else the noise is unused, and drawing it takes time
            b.noise[:frames].copy_(draw_noise(seed, (frames, *b.noise.shape[1:])))
        b.temperature.fill_(max(sampling.temperature, MIN_TEMPERATURE))
        b.top_p.fill_(sampling.top_p)
        b.repetition_penalty.fill_(sampling.repetition_penalty)
        b.position.zero_()
        for frame in range(frames):
            work.check()
            self.engine.run(frame)
            self.frames_decoded += 1
            self.bytes_read += self.frame_bytes(frame)
            yield b.codes[: frame + 1]

    def frame_bytes(self, position: int) -> int:
        """Return the bytes of weights, keys and values that the frame at ``position`` reads.

        The floor of batch-1 decoding is these bytes over the device's memory bandwidth. The fast
        layers are counted once a pass, though a cache may keep them.
        """
        c, size = self.model.config, self.dtype.itemsize
        kv = 2 * c.n_local_heads * c.head_dim
        slow_kv = c.n_layer * kv * (position + 1)
        passes = c.num_codebooks - 1
        fast_kv = c.n_fast_layer * kv * passes * (passes + 1) // 2
        return self._weight_bytes + (slow_kv + fast_kv) * size

    def _weights_read(self) -> int:
        """Count the bytes of weights; once, because walking the parameters slows a frame down."""
        m, size = self.model, self.dtype.itemsize
        slow = sum(p.numel() for p in (*m.layers.parameters(), *m.output.parameters()))
        fast = sum(p.numel() for p in m.fast_layers.parameters())
        heads = m.fast_output.numel()
        return (slow + fast * (m.config.num_codebooks - 1) + heads) * size

    def _step(self, bucket: int) -> None:
        m, b = self.model, self.buffers
        at = b.position
        known = m.embed_codes(b.codes.index_select(0, (at - 1).clamp(min=0)))
        known = known * (at > 0).to(known.dtype).unsqueeze(1)
        x = (b.conditions.index_select(0, at) + known).unsqueeze(1)
        rope = m.rope.index_select(0, at)
        mask = torch.where(self._places[:bucket] <= at, 0.0, float("-inf")).to(self.dtype)
        for layer, cache in zip(m.layers, b.slow, strict=True):
            assert isinstance(layer, Block)
            x = layer.step(x, rope, cache.first(bucket), at, mask)
        hidden = m.norm(x)[0]
        before = at - self._back
        real, recent = before >= 0, b.codes.index_select(0, before.clamp(min=0))
        noise = b.noise.index_select(0, at)[0]
        code = self._pick(m.output(hidden)[0], 0, noise, recent, real)
        chosen = [code]
        x = (hidden + m.fast_embeddings(code)).unsqueeze(1)
        for book in range(1, m.config.num_codebooks):
            place = self._fast_at[book - 1 : book]
            for layer, cache in zip(m.fast_layers, b.fast, strict=True):
                assert isinstance(layer, Block)
                x = layer.step(x, m.rope[book - 1 : book], cache.first(book), place, None)
            scores = m.fast_norm(x)[0, 0] @ m.fast_output[book - 1].T
            code = self._pick(scores, book, noise, recent, real)
            chosen.append(code)
            if book < m.config.num_codebooks - 1:
                x = m.fast_embeddings(code + book * m.config.codebook_size).unsqueeze(1)
        b.codes.index_copy_(0, at, torch.cat(chosen).unsqueeze(0))
        at += 1

    def _pick(
        self, scores: Tensor, book: int, noise: Tensor, recent: Tensor, real: Tensor
    ) -> Tensor:
        b = self.buffers
        scores = penalise(scores.float(), recent[:, book], real, b.repetition_penalty)
        return choose(scores, noise[book], b.temperature, b.top_p)
