"""The teacher's lexicon, and the stress and place in its word of every phone of the corpus.

flite's ``t2p`` prints one word's phones with stress; its phones of a sentence have neither stress
nor word boundaries, so the two are aligned. A word that the teacher pronounces differently in
sentences (``the``, ``and``) enters the lexicon as pronounced in sentences.

    python -m training.lexicon --out build/voice
"""

from __future__ import annotations

import gzip
import json
import random
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from training import recipe
from training.corpus import WORDS, shards
from workers.models.voice.phones import PAUSE, PHONE_ID, Phone, place

Spoken = tuple[str, ...]  # phones, a stressed vowel with a 1 behind it
WORD = re.compile(r"[a-z]+(?:'[a-z]+)*'?")
DATA = Path(__file__).parent.parent / "workers" / "models" / "voice" / "data"


def teacher_phones(word: str) -> Spoken:
    """Return the teacher's phones of one word; empty if one of them is unknown."""
    printed = subprocess.run(
        ["t2p", word], check=True, capture_output=True, text=True, timeout=20
    ).stdout.split()
    phones = tuple(p for p in printed if p != PAUSE)
    return phones if all(p.rstrip("1") in PHONE_ID for p in phones) else ()


def all_teacher_phones(words: Iterable[str]) -> dict[str, Spoken]:
    with ThreadPoolExecutor(4) as pool:
        listed = sorted(words)
        return {w: p for w, p in zip(listed, pool.map(teacher_phones, listed), strict=True) if p}


def align(expected: list[tuple[str, int]], said: list[str]) -> list[int]:
    """Return, for every spoken phone, the index of its expected phone, or -1.

    ``expected``: (phone without stress, word number). Edit distance; a pause costs nothing.
    """
    rows, columns = len(expected), len(said)
    cost = [[0.0] * (columns + 1) for _ in range(rows + 1)]
    step = [[0] * (columns + 1) for _ in range(rows + 1)]
    for j in range(1, columns + 1):
        cost[0][j], step[0][j] = cost[0][j - 1] + (said[j - 1] != PAUSE), 2
    for i in range(1, rows + 1):
        phone = expected[i - 1][0]
        cost[i][0], step[i][0] = float(i), 1
        row, above = cost[i], cost[i - 1]
        for j in range(1, columns + 1):
            heard = said[j - 1]
            pause = heard == PAUSE
            both = above[j - 1] + (9.0 if pause else 0.0 if heard == phone else 1.1)
            skip, extra = above[j] + 1.0, row[j - 1] + (0.0 if pause else 1.0)
            best = min(both, skip, extra)
            row[j] = best
            step[i][j] = 0 if best == both else 1 if best == skip else 2
    found, i, j = [-1] * columns, rows, columns
    while i or j:
        kind = step[i][j]
        if kind == 0:
            i, j = i - 1, j - 1
            found[j] = i
        elif kind == 1:
            i -= 1
        else:
            j -= 1
    return found


def annotate(words: list[Spoken], said: list[str]) -> tuple[list[Phone], list[list[str]]]:
    """Return the spoken phones with stress and place, and the spoken phones of each word."""
    expected = [(p.rstrip("1"), n) for n, phones in enumerate(words) for p in phones]
    stressed = [p.endswith("1") for phones in words for p in phones]
    found = align(expected, said)
    owner: list[int] = []  # the word of each phone said; a phone put in belongs to the word before
    last = 0
    for phone, index in zip(said, found, strict=True):
        last = expected[index][1] if index >= 0 else last
        owner.append(-1 if phone == PAUSE else last)
    spoken: list[list[str]] = [[] for _ in words]
    at = []
    for phone, word in zip(said, owner, strict=True):
        at.append(len(spoken[word]) if word >= 0 else 0)
        if word >= 0:
            spoken[word].append(phone)
    phones = []
    for phone, word, inside, index in zip(said, owner, at, found, strict=True):
        if word < 0:
            phones.append(Phone(PAUSE, False, 0))
        else:
            stress = index >= 0 and stressed[index]
            phones.append(Phone(phone, stress, place(inside, len(spoken[word]))))
    return phones, spoken


@recipe.step()
def main() -> None:
    parser = recipe.parser(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder for the lexicon")
    parser.add_argument(
        "--words", type=recipe.count, help="number of random words of the dictionary (all)"
    )
    args = parser.parse_args()
    corpus = recipe.input_file(args.out, recipe.CORPUS)
    lines = [line for _, part in shards(corpus) for line in part]
    listed = {w.lower() for w in WORDS.read_text().split() if re.fullmatch(r"[A-Za-z][a-z']+", w)}
    if args.words is not None:
        listed = set(random.Random(1).sample(sorted(listed), args.words))
    in_corpus = {w for line in lines for w in WORD.findall(str(line["text"]))}
    lexicon = all_teacher_phones(listed | in_corpus | set("abcdefghijklmnopqrstuvwxyz"))
    print(f"{len(lexicon)} words")

    aligned, unmatched = [], 0
    said_of: dict[str, Counter[Spoken]] = defaultdict(Counter)
    for line in lines:
        words = [w for w in WORD.findall(str(line["text"])) if w in lexicon]
        said: list[str] = [p for p, _ in line["phones"]]
        phones, spoken = annotate([lexicon[w] for w in words], said)
        for word, heard in zip(words, spoken, strict=True):
            said_of[word][tuple(heard)] += 1
            unmatched += not heard
        aligned.append([p.symbol for p in phones])
    (args.out / "symbols.json").write_text(json.dumps(aligned))
    changed = 0
    for word, counts in said_of.items():
        (most, count), total = counts.most_common(1)[0], sum(counts.values())
        plain = tuple(p.rstrip("1") for p in lexicon[word])
        if most and most != plain and count >= 5 and count > 0.6 * total:
            vowels = [p.endswith("1") for p in lexicon[word]]
            keep = len(vowels) == len(most)
            lexicon[word] = tuple(p + "1" * (keep and vowels[i]) for i, p in enumerate(most))
            changed += 1
            print("said otherwise in sentences:", word, plain, most, count, total)
    print(f"{unmatched} words without a phone, {changed} words changed")
    args.data.mkdir(parents=True, exist_ok=True)
    text = "\n".join(f"{word} {' '.join(phones)}" for word, phones in sorted(lexicon.items()))
    with gzip.GzipFile(args.data / "lexicon.txt.gz", "wb", compresslevel=9, mtime=0) as out:
        out.write(text.encode())


if __name__ == "__main__":
    main()
