"""Grapheme to phoneme: a small network that predicts a chunk of phones for every letter."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

LETTERS = "'abcdefghijklmnopqrstuvwxyz"
LETTER_ID = {letter: number + 1 for number, letter in enumerate(LETTERS)}  # 0 is the padding
MAX_CHUNKS = 512


class G2P(nn.Module):
    """Scores the chunks of letters (batch, length): (batch, length, MAX_CHUNKS)."""

    def __init__(self, width: int = 128, layers: int = 3) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(len(LETTERS) + 1, width, padding_idx=0)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2) for _ in range(layers))
        self.dropout = nn.Dropout(0.1)
        self.output = nn.Linear(width, MAX_CHUNKS)

    def forward(self, letters: Tensor) -> Tensor:
        x = self.embeddings(letters)
        spoken = (letters > 0).unsqueeze(-1).to(x.dtype)
        for layer in self.layers:
            found = layer((x * spoken).transpose(1, 2)).transpose(1, 2)
            x = x + self.dropout(functional.silu(found))
        return self.output(x)  # type: ignore[no-any-return]


@torch.no_grad()
def phones_of(network: G2P, chunks: list[str], word: str) -> list[str]:
    """Predict the phones of ``word``; ``chunks`` are the labels of the scores ("k s1", or "")."""
    letters = [LETTER_ID[letter] for letter in word if letter in LETTER_ID]
    if not letters:
        return []
    scores = network(torch.tensor([letters]))[0, :, : len(chunks)]
    said = [p for best in scores.argmax(-1).tolist() for p in chunks[best].split()]
    return said or ["ax"]
