"""What the speech users say: short, medium and long texts from a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

GROUPS = ("short", "medium", "long")
MIXED = "mixed"
OWN_FILE = Path(__file__).resolve().parent / "texts.txt"


class TextsError(ValueError):
    """A file of texts that cannot be used; the message names the file, the line and the remedy."""


@dataclass(frozen=True)
class Text:
    group: str
    words: str


def load(file: Path) -> dict[str, tuple[str, ...]]:
    """The texts of each group. Raises TextsError."""
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    group = ""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TextsError(f"{file}: cannot be read: {error}") from None
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        if line.startswith("[") and line.endswith("]"):
            group = line[1:-1].strip()
            if group not in groups:
                raise TextsError(
                    f"{file}:{number}: {line} is not a group; use one of {', '.join(GROUPS)}"
                )
        elif not group:
            raise TextsError(f"{file}:{number}: a text before the first heading, such as [short]")
        else:
            groups[group].append(line)
    missing = [group for group, texts in groups.items() if not texts]
    if missing:
        raise TextsError(
            f"{file}: no texts under [{missing[0]}]; each of {', '.join(GROUPS)} needs one"
        )
    return {group: tuple(texts) for group, texts in groups.items()}


def pick(texts: dict[str, tuple[str, ...]], group: str, random: Random) -> Text:
    """A text of ``group``; of any group, each as likely, for "mixed"."""
    chosen = random.choice(GROUPS) if group == MIXED else group
    return Text(chosen, random.choice(texts[chosen]))
