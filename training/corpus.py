"""The corpus: sentences, and the teacher's speech for them.

The teacher is flite's voice ``slt``. For every sentence it gives the waveform (16 kHz) and its
phones with their end times. Nothing is downloaded: the sentences come from Debian's packages
``fortunes`` and ``wamerican``.

    python -m training.corpus --out build/voice --sentences 20000
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import tempfile
import wave
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training import recipe

SAMPLE_RATE = 16_000
FORTUNES = Path("/usr/share/games/fortunes")
WORDS = Path("/usr/share/dict/american-english")
HELD_OUT = Path(__file__).with_name("held_out.txt")
ALLOWED = re.compile(r"[a-z '.,?!-]+\Z")
MIN_CHARACTERS, MAX_CHARACTERS = 15, 110  # characters of a sentence


def fortune_sentences(folder: Path = FORTUNES) -> list[str]:
    """Return plain sentences of the fortune files, in a fixed order, without repetition."""
    found: dict[str, None] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        for fortune in re.split(r"^%$", text, flags=re.M):
            body = re.split(r"^\s*--", fortune, flags=re.M)[0]
            flat = re.sub(r"\s+", " ", body).strip()
            for sentence in re.split(r"(?<=[.?!])\s+", flat):
                clean = sentence.strip(" \"'").replace('"', "").lower()
                clean = re.sub(r"\s*--+\s*", ", ", clean)
                if not MIN_CHARACTERS <= len(clean) <= MAX_CHARACTERS or not ALLOWED.match(clean):
                    continue
                if clean[-1] not in ".?!":
                    clean += "."
                found.setdefault(clean)
    return list(found)


def word_lists(count: int, seed: int, path: Path = WORDS) -> list[str]:
    """Return random lists of dictionary words, so that rare sounds and words occur too."""
    rng = random.Random(seed)
    words = [w for w in path.read_text(encoding="utf-8").split() if re.fullmatch(r"[a-z]{2,14}", w)]
    lists: list[str] = []
    while len(lists) < count:
        picked = rng.sample(words, rng.randint(3, 9))
        joined = " ".join(w + ("," if rng.random() < 0.15 else "") for w in picked).rstrip(",")
        if MIN_CHARACTERS <= len(joined) < MAX_CHARACTERS:
            lists.append(joined + rng.choice("....?!"))
    return lists


def sentences(count: int, seed: int) -> list[str]:
    """Return ``count`` sentences: fortunes, then word lists; none of the held-out ones."""
    held_out = {line.strip().lower() for line in HELD_OUT.read_text().splitlines()}
    real = [s for s in fortune_sentences() if s not in held_out]
    random.Random(seed).shuffle(real)
    real = real[:count]
    return real + word_lists(count - len(real), seed)


def say(text: str) -> tuple[NDArray[np.int16], list[tuple[str, float]]]:
    """Let the teacher speak; return samples, and (phone, end in seconds) in order.

    flite cuts the waveform's leading silence but counts the phones' times from before the cut;
    the difference of the two lengths is the cut, and the times are shifted by it.
    """
    with tempfile.NamedTemporaryFile(suffix=".wav") as out:
        printed = subprocess.run(
            ["flite", "-voice", "slt", "-psdur", "-t", text, "-o", out.name],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout
        with wave.open(out.name) as opened:
            samples = np.frombuffer(opened.readframes(opened.getnframes()), dtype=np.int16)
    phones = []
    for item in printed.split():
        name, _, end = item.rpartition(":")
        phones.append((name, float(end)))
    shift = phones[-1][1] - len(samples) / SAMPLE_RATE
    return samples, [(name, max(0.0, end - shift)) for name, end in phones]


def _say_all(batch: tuple[int, list[str], Path]) -> int:
    index, texts, folder = batch
    shard = folder / f"{index:05d}.npz"
    if shard.exists():
        return len(texts)
    waves, lines = [], []
    for text in texts:
        try:
            samples, phones = say(text)
        except (subprocess.SubprocessError, ValueError, IndexError):
            continue
        if not SAMPLE_RATE // 2 < len(samples) < 10 * SAMPLE_RATE:
            continue
        waves.append(samples)
        lines.append({"text": text, "phones": phones, "samples": len(samples)})
    if not waves:
        raise recipe.StepError(
            f"flite spoke none of {len(texts)} sentences; try: flite -voice slt -t hello -o none"
        )
    part = shard.with_suffix(".part.npz")
    np.savez(part, samples=np.concatenate(waves), lines=json.dumps(lines))
    part.rename(shard)
    return len(lines)


def shards(folder: Path) -> Iterator[tuple[NDArray[np.int16], list[dict[str, Any]]]]:
    """Yield every shard: its concatenated samples, and one line for each sentence."""
    for path in sorted(folder.glob("?????.npz")):
        with np.load(path) as data:
            yield data["samples"], json.loads(str(data["lines"]))


@recipe.step()
def main() -> None:
    parser = recipe.parser(__doc__)
    parser.add_argument("--sentences", type=recipe.count, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=recipe.count, default=2)
    args = parser.parse_args()
    folder = args.out / recipe.CORPUS
    folder.mkdir(parents=True, exist_ok=True)
    texts = sentences(args.sentences, args.seed)
    random.Random(args.seed).shuffle(texts)
    batches = [(i, texts[i : i + 200], folder) for i in range(0, len(texts), 200)]
    done = 0
    with ProcessPoolExecutor(args.processes) as pool:
        for count in pool.map(_say_all, batches):
            done += count
            print(f"{done} of {len(texts)} sentences", flush=True)


if __name__ == "__main__":
    main()
