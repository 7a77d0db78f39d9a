"""The DualAR decoder: a slow transformer for each frame, a fast one for each codebook.

The anatomy and the configuration names are fish-speech's. Two things differ. The text is no
prefix of the frames: a small encoder reads the sentence's phones, durations are
predicted for them, and every frame is conditioned on the phones it falls into, so the length is
known before the first frame. And the first fast pass takes the slow hidden state and the first
code together, so a frame of C codebooks is one slow pass and C - 1 fast ones.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.models.voice.phones import NUM_SYMBOLS, SIGNS
from workers.models.voice.spectrum import STEPS

PLACES_IN_FRAME = STEPS + 1
"""A frame is conditioned on the phones of its own steps and of the next frame's first."""


@dataclass(frozen=True)
class DualARConfig:
    """Sizes of the network; stored in the weights' file and checked against it."""

    vocab_size: int = NUM_SYMBOLS
    n_text_layer: int = 3
    n_layer: int = 6
    dim: int = 256
    n_head: int = 4
    n_local_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 640
    n_fast_layer: int = 2
    num_codebooks: int = 7
    codebook_size: int = 512
    max_seq_len: int = 1024
    """Frames of the longest sentence."""
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    dropout: float = 0.1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> DualARConfig:
        """Read a stored configuration. Raises ValueError for unknown or missing keys."""
        known = {field.name for field in fields(cls)}
        if known != values.keys():
            odd = ", ".join(sorted(known ^ values.keys()))
            raise ValueError(
                f"configuration has missing or unknown keys: {odd}; use weights of this version"
            )
        return cls(**values)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_table(length: int, head_dim: int, base: float) -> Tensor:
    """Return (length, 2, head_dim): factors of a position's values and of their other halves."""
    rates = base ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), rates)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], dim=1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate (..., time, head_dim) by ``table`` (time, 2, head_dim), of the same dtype."""
    return torch.addcmul(x * table[:, 0], x.roll(x.shape[-1] // 2, -1), table[:, 1])


@dataclass
class KVCache:
    """Keys and values of one layer: (1, n_local_heads, length, head_dim), written in place."""

    k: Tensor
    v: Tensor

    def first(self, length: int) -> KVCache:
        """Return the first positions as a view, so that a short sentence reads a short cache."""
        return KVCache(self.k[:, :, :length], self.v[:, :, :length])

    @classmethod
    def empty(
        cls, config: DualARConfig, length: int, device: torch.device, dtype: torch.dtype
    ) -> KVCache:
        shape = (1, config.n_local_heads, length, config.head_dim)
        return cls(
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=dtype),
        )


class Attention(nn.Module):
    def __init__(self, config: DualARConfig) -> None:
        super().__init__()
        self.config = config
        heads = config.n_head + 2 * config.n_local_heads
        self.wqkv = nn.Linear(config.dim, heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_head * config.head_dim, config.dim, bias=False)

    def split(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project (batch, time, dim) to queries, keys (both rotated) and values by head."""
        c = self.config
        parts = self.wqkv(x).view(*x.shape[:2], -1, c.head_dim).transpose(1, 2)
        q, k, v = parts.split([c.n_head, c.n_local_heads, c.n_local_heads], dim=1)
        rope = rope.to(x.dtype)
        return rotate(q, rope), rotate(k, rope), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        share = self.config.n_head // self.config.n_local_heads
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.wo(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        q, k, v = self.split(x, rope)
        return self.attend(q, k, v, mask, causal)

    def step(
        self, x: Tensor, rope: Tensor, cache: KVCache, at: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Compute one position: write its key and value at ``at`` (1,), attend to all of ``cache``.

        ``mask``: (length of the cache,), 0 where the position may look and -inf elsewhere; None
        lets it look everywhere.
        """
        c = self.config
        heads = self.wqkv(x).view(-1, c.head_dim)
        turned = rotate(heads[: -c.n_local_heads], rope)
        shape = (1, c.n_local_heads, 1, c.head_dim)
        cache.k.index_copy_(2, at, turned[c.n_head :].view(shape))
        cache.v.index_copy_(2, at, heads[-c.n_local_heads :].view(shape))
        # The heads that share a key lie side by side: one product for each key head.
        q = turned[: c.n_head].view(c.n_local_heads, -1, c.head_dim) * c.head_dim**-0.5
        scores = q @ cache.k[0].transpose(1, 2)
        if mask is not None:
            scores = scores + mask
        out = torch.softmax(scores, dim=-1) @ cache.v[0]
        return self.wo(out.view(1, 1, -1))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    def __init__(self, config: DualARConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, config: DualARConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, rope: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rope, mask, causal))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))  # type: ignore[no-any-return]

    def step(
        self, x: Tensor, rope: Tensor, cache: KVCache, at: Tensor, mask: Tensor | None
    ) -> Tensor:
        x = x + self.attention.step(self.attention_norm(x), rope, cache, at, mask)
        return x + self.feed_forward(self.ffn_norm(x))  # type: ignore[no-any-return]


class DualAR(nn.Module):
    """The network's parts; ``workers.models.voice.decoding`` runs them a frame at a time."""

    rope: Tensor
    book_offsets: Tensor

    def __init__(self, config: DualARConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embeddings = nn.Embedding(c.vocab_size, c.dim)
        self.sign_embeddings = nn.Embedding(len(SIGNS), c.dim)
        self.text_layers = nn.ModuleList(Block(c) for _ in range(c.n_text_layer))
        self.text_norm = RMSNorm(c.dim, c.norm_eps)
        self.duration = nn.Sequential(
            nn.Linear(c.dim, c.dim), nn.SiLU(), nn.Dropout(c.dropout), nn.Linear(c.dim, 1)
        )
        self.frame_phones = nn.Linear(PLACES_IN_FRAME * c.dim, c.dim)
        self.frame_places = nn.Linear(PLACES_IN_FRAME * 3, c.dim)

        self.codebook_embeddings = nn.Embedding(c.num_codebooks * c.codebook_size, c.dim)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.output = nn.Linear(c.dim, c.codebook_size, bias=False)

        fast_books = c.num_codebooks - 1
        self.fast_embeddings = nn.Embedding(fast_books * c.codebook_size, c.dim)
        self.fast_layers = nn.ModuleList(Block(c) for _ in range(c.n_fast_layer))
        self.fast_norm = RMSNorm(c.dim, c.norm_eps)
        self.fast_output = nn.Parameter(torch.empty(fast_books, c.codebook_size, c.dim))
        """One head for each codebook, whose entries have different meanings."""

        self.register_buffer(
            "rope", rope_table(max(c.max_seq_len, 1024), c.head_dim, c.rope_base), persistent=False
        )
        self.register_buffer(
            "book_offsets", torch.arange(c.num_codebooks) * c.codebook_size, persistent=False
        )
        self.apply(self._initialise)
        nn.init.normal_(self.fast_output, std=0.02)
        deep = 0.02 / math.sqrt(2 * c.n_layer)
        for name, weight in self.named_parameters():
            if name.endswith(("wo.weight", "w2.weight")):
                nn.init.normal_(weight, std=deep)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def read(self, symbols: Tensor, sign: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Encode (batch, phones), (batch,) to (batch, phones, dim); ``lengths`` masks padding."""
        x = self.embeddings(symbols) + self.sign_embeddings(sign).unsqueeze(1)
        mask = None
        if lengths is not None:
            at = torch.arange(symbols.shape[1], device=symbols.device)
            mask = (at < lengths.unsqueeze(1))[:, None, None, :]
        rope = self.rope[: symbols.shape[1]]
        for layer in self.text_layers:
            x = layer(x, rope, mask)
        return self.text_norm(x)  # type: ignore[no-any-return]

    def durations(self, read: Tensor) -> Tensor:
        """Predict the natural logarithm of each phone's steps: (batch, phones)."""
        return self.duration(read).squeeze(-1)  # type: ignore[no-any-return]

    def condition(self, read: Tensor, phone_of: Tensor, places: Tensor) -> Tensor:
        """Return the conditions of each frame: (batch, frames, dim).

        ``phone_of``: (batch, frames, PLACES_IN_FRAME), the phone that each step falls into;
        ``places``: (batch, frames, PLACES_IN_FRAME, 3), see ``timing.Timing``.
        """
        batch, frames, _ = phone_of.shape
        index = phone_of.reshape(batch, -1, 1).expand(-1, -1, read.shape[-1])
        phones = read.gather(1, index).reshape(batch, frames, -1)
        placed = self.frame_places(places.flatten(2).to(read.dtype))
        return self.frame_phones(phones) + placed  # type: ignore[no-any-return]

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Embed codes (..., num_codebooks) to (..., dim)."""
        return self.codebook_embeddings(codes + self.book_offsets).sum(-2)  # type: ignore[no-any-return]

    def slow(self, x: Tensor) -> Tensor:
        """Compute hidden states of all frames at once, as in training: (batch, frames, dim)."""
        rope = self.rope[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, rope, causal=True)
        return self.norm(x)  # type: ignore[no-any-return]

    def fast(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Compute logits of all codebooks but the first at once, as in training.

        (n, dim) and (n, num_codebooks) -> (n, num_codebooks - 1, size).
        """
        known = self.fast_embeddings(codes[:, :-1] + self.book_offsets[:-1])
        first = (hidden + known[:, 0]).unsqueeze(1)
        x = torch.cat([first, known[:, 1:]], dim=1)
        for layer in self.fast_layers:
            x = layer(x, self.rope[: x.shape[1]], causal=True)
        return torch.einsum("nkd,ksd->nks", self.fast_norm(x), self.fast_output)
