"""Train the grapheme-to-phoneme network for words outside the lexicon, on the lexicon.

    python -m training.g2p --out build/voice

Letters and phones are aligned first: every letter stands for up to two phones, and the likely ones
of each letter are found by alternating between counting and aligning.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional

from training import recipe
from workers.models.voice.g2p import G2P, LETTER_ID, MAX_CHUNKS, phones_of
from workers.models.voice.text import DATA, lexicon

Chunk = tuple[str, ...]


def segment(word: str, phones: list[str], cost: dict[tuple[str, Chunk], float]) -> list[Chunk]:
    """Distribute the phones over the letters at the lowest cost; empty if that is impossible."""
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for letter in word:
        reach: dict[int, tuple[float, int]] = {}
        for at, (so_far, _) in best[-1].items():
            for size in range(3):
                if at + size > len(phones):
                    break
                chunk = tuple(p.rstrip("1") for p in phones[at : at + size])
                price = so_far + cost.get((letter, chunk), 12.0 + 2 * size)
                if at + size not in reach or price < reach[at + size][0]:
                    reach[at + size] = (price, size)
        best.append(reach)
    if len(phones) not in best[-1]:
        return []
    found, at = [], len(phones)
    for row in reversed(best[1:]):
        size = row[at][1]
        found.append(tuple(phones[at - size : at]))
        at -= size
    return found[::-1]


def align(words: dict[str, list[str]], rounds: int = 5) -> dict[str, list[Chunk]]:
    cost: dict[tuple[str, Chunk], float] = {}
    same = {"c": "k", "x": "k", "j": "jh", "q": "k", "y": "iy", "h": "hh", "a": "ae", "e": "eh"}
    same |= {"i": "ih", "o": "aa", "u": "ah"}
    for letter in LETTER_ID:
        cost[letter, (same.get(letter, letter),)] = 1.0
        cost[letter, ()] = 4.0
    aligned: dict[str, list[Chunk]] = {}
    for _ in range(rounds):
        aligned = {w: segment(w, p, cost) for w, p in words.items()}
        pairs: Counter[tuple[str, Chunk]] = Counter()
        letters: Counter[str] = Counter()
        for word, chunks in aligned.items():
            for letter, chunk in zip(word, chunks, strict=False):
                pairs[letter, tuple(p.rstrip("1") for p in chunk)] += 1
                letters[letter] += 1
        cost = {k: -math.log(n / letters[k[0]]) for k, n in pairs.items() if n >= 5}
    return {w: c for w, c in aligned.items() if c}


@recipe.step()
def main() -> None:
    parser = recipe.parser(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the lexicon")
    parser.add_argument("--steps", type=recipe.count, default=3000)
    parser.add_argument("--held-back", type=recipe.count, default=2000, help="words for validation")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    recipe.input_file(args.data, "lexicon.txt.gz")
    args.out.mkdir(parents=True, exist_ok=True)
    known = lexicon(args.data).items()
    words = {w: p for w, p in known if len(w) > 1 and all(c in LETTER_ID for c in w)}
    aligned = align(words)
    counts = Counter(" ".join(chunk) for chunks in aligned.values() for chunk in chunks)
    chunks = [chunk for chunk, _ in counts.most_common(MAX_CHUNKS)]
    number = {chunk: i for i, chunk in enumerate(chunks)}
    usable = [w for w, c in aligned.items() if all(" ".join(x) in number for x in c)]
    if len(usable) <= args.held_back:
        raise recipe.StepError(
            f"--held-back {args.held_back} of {len(usable)} words must leave some for training",
            recipe.BAD_ARGUMENT,
        )
    rng.shuffle(usable)
    held_back, learnt = usable[: args.held_back], usable[args.held_back :]
    print(f"{len(aligned)} of {len(words)} words aligned, {len(counts)} chunks, {len(usable)} used")

    network = G2P()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / args.steps)) + 1e-6
        picked = rng.sample(learnt, min(128, len(learnt)))
        letters = [torch.tensor([LETTER_ID[c] for c in w]) for w in picked]
        says = [torch.tensor([number[" ".join(c)] for c in aligned[w]]) for w in picked]
        x = torch.nn.utils.rnn.pad_sequence(letters, batch_first=True)
        y = torch.nn.utils.rnn.pad_sequence(says, batch_first=True, padding_value=-1)
        loss = functional.cross_entropy(network(x).flatten(0, 1), y.flatten(), ignore_index=-1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 500 == 499:
            print(f"step {step + 1}: loss {float(loss.detach()):.4f}", flush=True)
    network.eval()
    right = sum(
        [p.rstrip("1") for p in phones_of(network, chunks, w)] == [p.rstrip("1") for p in words[w]]
        for w in held_back
    )
    report = {"seed": args.seed, "held_back": len(held_back), "words_right": right}
    print(report)
    metadata = {"chunks": json.dumps(chunks), "training": json.dumps(report)}
    weights = {k: v.to(torch.float16) for k, v in network.state_dict().items()}
    save_file(weights, args.out / "g2p.safetensors", metadata)


if __name__ == "__main__":
    main()
