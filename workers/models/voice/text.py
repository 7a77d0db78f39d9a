"""From written text to sentences of phones.

Numbers are expanded first; a word's phones come from the lexicon that the teacher wrote, or, for a
word outside it, from a small network that was trained on that lexicon (grapheme to phoneme).
"""

from __future__ import annotations

import gzip
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from workers.model.contract import InvalidRequest
from workers.models.voice.number_expansion import expand_numbers
from workers.models.voice.phones import NO_WORD, PAUSE, Phone, place

DATA = Path(__file__).with_name("data")
MAX_WORD_LETTERS = 24  # letters; longer ones are said in pieces
MAX_SENTENCE_LETTERS = 180  # letters; longer ones are said in parts
ABBREVIATIONS = {
    "mr": "mister", "mrs": "missus", "ms": "miz", "dr": "doctor", "prof": "professor",
    "st": "saint", "vs": "versus", "etc": "et cetera",
    "approx": "approximately", "dept": "department", "jr": "junior", "sr": "senior",
    "inc": "incorporated", "ltd": "limited", "jan": "january",
    "feb": "february", "aug": "august", "sept": "september", "oct": "october",
    "nov": "november", "dec": "december",
}  # fmt: skip
SYMBOLS = {
    "&": " and ", "%": " percent ", "+": " plus ", "=": " equals ", "@": " at ", "#": " number ",
    "°": " degrees ", "\u00d7": " times ", "÷": " divided by ", "/": " slash ", "\u2044": " over ",
    "<": " less than ", ">": " greater than ", "_": " ", "~": " about ", "|": " ",
}  # fmt: skip
WITHOUT_MARK = str.maketrans(
    {"ß": "ss", "æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe", "ø": "o", "Ø": "O", "ł": "l",
     "Ł": "L", "đ": "d", "Đ": "D", "ð": "d", "Ð": "D", "þ": "th", "Þ": "Th", "\u0131": "i"}
)  # fmt: skip
"""Letters that Unicode does not decompose to a plain one."""


@dataclass(frozen=True)
class Sentence:
    """The unit of decoding."""

    phones: list[Phone]
    sign: str
    """Its end: one of ``phones.SIGNS``."""


def normalise(text: str) -> str:
    """Reduce text to lower-case words and ``, . ? !``; drop what has no sound, such as emoji."""
    text = unicodedata.normalize("NFKC", text)
    for curly, plain in (("’", "'"), ("‘", "'"), ("—", ", "), ("–", ", ")):  # noqa: RUF001
        text = text.replace(curly, plain)
    text = re.sub(r"https?://|www\.", " ", text)
    # These two would be taken for initials, the next for the end of a sentence or a saint.
    text = re.sub(r"\be\.g\.", " for example ", text, flags=re.I)
    text = re.sub(r"\bi\.e\.", " that is ", text, flags=re.I)
    text = re.sub(r"\bno\.\s*+(?=\d)", "number ", text, flags=re.I)
    text = re.sub(r"(?<=[a-z] )St\.(?=[,.?!]|\s+[a-z]|$)", "street", text)
    text = expand_numbers(text)
    text = re.sub(r"\b(?:[A-Za-z]\.){2,}", lambda m: _letters(m[0].replace(".", "")), text)
    for symbol, said in SYMBOLS.items():
        text = text.replace(symbol, said)
    text = unicodedata.normalize("NFKD", text.translate(WITHOUT_MARK))
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = re.sub(r"\b([A-Z]{2,5})(s?)\b", _expand_acronym, text)
    text = text.lower()
    for short, full in ABBREVIATIONS.items():
        text = re.sub(rf"\b{re.escape(short)}\.(?=[\s,]|$)", full, text)
    text = re.sub(r"[;:()\[\]{}\n]+", ",", text)
    text = re.sub(r"[^a-z',.?!]+", " ", text)
    # A full stop inside a name is pronounced.
    return re.sub(r"(?<=[a-z])\.(?=[a-z])", " dot ", text).strip()


def _letters(name: str) -> str:
    """Return the letters one by one; "a" alone would be pronounced like the article."""
    return " ".join("ay" if letter in "aA" else letter for letter in name) + " "


def _expand_acronym(match: re.Match[str]) -> str:
    if match[0].lower() in lexicon():
        return match[0]
    return _letters(match[1]).rstrip() + ("'s" if match[2] else "")


@cache
def lexicon(folder: Path = DATA) -> dict[str, list[str]]:
    """Read the lexicon: the phones of each word, a stressed vowel followed by 1."""
    lines = gzip.decompress((folder / "lexicon.txt.gz").read_bytes()).decode().splitlines()
    return {word: phones.split() for word, _, phones in (line.partition(" ") for line in lines)}


def word_phones(word: str, g2p: Callable[[str], list[str]]) -> list[str]:
    """Return the phones of one lower-case word; ``g2p`` predicts those outside the lexicon."""
    known = lexicon()
    if word in known:
        return known[word]
    if word.endswith("'s") and word[:-2] in known:
        stem = known[word[:-2]]
        if stem[-1] in {"s", "z", "sh", "zh", "ch", "jh"}:
            return [*stem, "ax", "z"]
        return [*stem, "s" if stem[-1] in {"p", "t", "k", "f", "th"} else "z"]
    return g2p(word.replace("'", ""))


def _parts(text: str) -> list[tuple[list[str], str]]:
    """Return clauses (words between commas), each with the sign at its end."""
    found: list[tuple[list[str], str]] = []
    for body, sign in re.findall(r"([^,.?!]*)([,.?!]+|$)", text):
        words = [w for raw in body.split() for w in _pieces(raw)]
        if words or (sign and found and found[-1][1] == ","):
            last = next((c for c in reversed(sign) if c in "?!."), "," if sign else ".")
            if words:
                found.append((words, last))
            elif last != ",":
                found[-1] = (found[-1][0], last)
    return found


def _pieces(word: str) -> list[str]:
    """Cut a word into pieces of at most MAX_WORD_LETTERS, each with a letter."""
    parts = (
        word[i : i + MAX_WORD_LETTERS].strip("'") for i in range(0, len(word), MAX_WORD_LETTERS)
    )
    return [part for part in parts if part]


def sentences(
    text: str, g2p: Callable[[str], list[str]], longest: int = MAX_SENTENCE_LETTERS
) -> list[Sentence]:
    """Split into sentences short enough to decode; raises InvalidRequest when nothing is left."""
    groups: list[tuple[list[list[str]], str]] = []
    clauses: list[list[str]] = []
    letters = 0
    for words, sign in _parts(normalise(text)):
        for part in _short(words, longest):
            length = sum(len(w) + 1 for w in part)
            if clauses and letters + length > longest:
                groups.append((clauses, "."))
                clauses, letters = [], 0
            clauses.append(part)
            letters += length
        if sign != ",":
            groups.append((clauses, sign))
            clauses, letters = [], 0
    if clauses:
        groups.append((clauses, "."))
    if not groups:
        raise InvalidRequest("input has nothing to speak; it must contain letters or digits.")
    return [Sentence(_phones(clauses, g2p), sign) for clauses, sign in groups]


def _short(words: list[str], longest: int) -> list[list[str]]:
    """Cut a clause into parts of at most ``longest`` letters, but at least one word."""
    parts, letters = [[words[0]]], len(words[0])
    for word in words[1:]:
        letters += len(word) + 1
        if letters > longest:
            parts.append([])
            letters = len(word)
        parts[-1].append(word)
    return parts


def _phones(clauses: list[list[str]], g2p: Callable[[str], list[str]]) -> list[Phone]:
    pause = Phone(PAUSE, False, NO_WORD)
    phones = [pause]
    for words in clauses:
        for word in words:
            said = word_phones(word, g2p)
            phones += [
                Phone(p.rstrip("1"), p.endswith("1"), place(i, len(said)))
                for i, p in enumerate(said)
            ]
        phones.append(pause)
    return phones
