"""Residual vector quantisation: the codec's codebooks, found by k-means.

Codebook 0 takes the envelope's largest part, codebook 1 the pitch and voicing of the frame, and
each further one the residual of the envelope's codebooks before it. The slow transformer
predicts codebook 0; the fast one the others in turn.

    python -m training.quantiser --out build/voice
"""

from __future__ import annotations

import json

import numpy as np
import torch
from safetensors.torch import save_file

from training import recipe
from workers.models.voice.spectrum import N_MELS, STEPS

NUM_CODEBOOKS = 7
CODEBOOK_SIZE = 512
PITCH_BOOK = 1
VOICING_WEIGHT = 0.6  # the voicing that counts as much as one standard deviation of the pitch


def frames_of(steps: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Join steps to frames, (all steps, width) -> (all frames, STEPS * width).

    A sentence's last step is repeated to fill its last frame.
    """
    frames = []
    for part in torch.split(steps, lengths):
        missing = -len(part) % STEPS
        padded = torch.cat([part, part[-1:].expand(missing, -1)]) if missing else part
        frames.append(padded.reshape(-1, STEPS * part.shape[1]))
    return torch.cat(frames)


def nearest(vectors: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest entry for every vector: (n,)."""
    norms = (book * book).sum(1)
    return torch.cat([(norms - 2 * part @ book.T).argmin(1) for part in vectors.split(16384)])


def k_means(vectors: torch.Tensor, size: int, rounds: int, seed: int) -> torch.Tensor:
    """Find ``size`` entries for (n, width); entries without vectors are replaced by random ones."""
    rng = torch.Generator().manual_seed(seed)
    book = vectors[torch.randperm(len(vectors), generator=rng)[:size]].clone()
    for _ in range(rounds):
        index = nearest(vectors, book)
        count = torch.bincount(index, minlength=size).unsqueeze(1)
        total = torch.zeros_like(book).index_add_(0, index, vectors)
        fresh = vectors[torch.randint(len(vectors), (size,), generator=rng)]
        book = torch.where(count > 0, total / count.clamp(min=1), fresh)
    return book


@recipe.step()
def main() -> None:
    parser = recipe.parser(__doc__)
    parser.add_argument("--vectors", type=recipe.count, default=100_000, help="frames for k-means")
    parser.add_argument("--rounds", type=recipe.count, default=12)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    data = np.load(recipe.input_file(args.out, "features.npz"))
    lines = json.loads(str(data["lines"]))
    lengths = [line["steps"] for line in lines]
    mel = torch.from_numpy(data["mel"]).float()
    pitch = torch.from_numpy(data["pitch"]).float()
    mel_mean, mel_std = mel.mean(0), mel.std(0)
    # One scale for all bins: an error of a decibel is as audible in one as in another.
    mel_scale = mel_std.mean()
    f0_mean, f0_std = pitch[:, 0].mean(), pitch[:, 0].std()
    normal = frames_of((mel - mel_mean) / mel_scale, lengths)
    spoken = torch.stack([(pitch[:, 0] - f0_mean) / f0_std, pitch[:, 1] / VOICING_WEIGHT], 1)
    prosody = frames_of(spoken, lengths)
    rng = torch.Generator().manual_seed(args.seed)
    seen = torch.randperm(len(normal), generator=rng)[: args.vectors]
    if len(seen) < CODEBOOK_SIZE:
        raise recipe.StepError(
            f"too few frames for codebooks of {CODEBOOK_SIZE}: {len(seen)}; "
            "use more --vectors, or more --sentences in steps 1 and 2"
        )

    codes = torch.empty(len(normal), NUM_CODEBOOKS, dtype=torch.int16)
    books: list[torch.Tensor] = []
    residual = normal.clone()
    power = (normal**2).mean()
    for number in range(NUM_CODEBOOKS):
        source = prosody if number == PITCH_BOOK else residual
        book = k_means(source[seen], CODEBOOK_SIZE, args.rounds, args.seed + number)
        index = nearest(source, book)
        codes[:, number] = index.to(torch.int16)
        books.append(book)
        if number == PITCH_BOOK:
            left = ((prosody - book[index]) ** 2).mean() / prosody.var()
            print(f"codebook {number} (pitch): {left:.4f} of the variance left", flush=True)
        else:
            residual -= book[index]
            print(f"codebook {number}: {(residual**2).mean() / power:.4f} of the power left")
    wide = [b for n, b in enumerate(books) if n != PITCH_BOOK]
    save_file(
        {
            "mel_books": torch.stack(wide),  # (NUM_CODEBOOKS - 1, CODEBOOK_SIZE, STEPS * N_MELS)
            "pitch_book": books[PITCH_BOOK],  # (CODEBOOK_SIZE, STEPS * 2)
            "mel_mean": mel_mean,
            "mel_scale": mel_scale.reshape(1),
            "pitch_stats": torch.stack([f0_mean, f0_std, torch.tensor(VOICING_WEIGHT)]),
        },
        args.out / "quantiser.safetensors",
    )
    assert wide[0].shape[1] == STEPS * N_MELS
    counts = [-(-length // STEPS) for length in lengths]
    np.savez(args.out / "codes.npz", codes=codes.numpy(), counts=np.array(counts))
    print(f"{len(codes)} frames of {len(lines)} sentences")


if __name__ == "__main__":
    main()
