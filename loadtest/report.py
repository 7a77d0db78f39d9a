"""``python -m loadtest.report DIR…``: the table again, from the raw samples alone.

Exit codes: 1, with one line, for a stored summary that does not follow from its rows; 2 for results
that cannot be read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from loadtest import samples
from loadtest.arguments import Parser
from loadtest.samples import Sample, SamplesError
from loadtest.summary import Figures, MismatchError, compare, summarise
from loadtest.table import render

SAMPLES, WARM_UP, SUMMARY = "samples.csv", "warm-up.csv", "summary.json"
DONE, REFUSED, UNREADABLE = 0, 1, 2


@dataclass(frozen=True)
class Results:
    """A run on disk."""

    rows: list[Sample]
    figures: Figures
    """Computed from the rows."""
    stored: dict[str, Any] | None
    """``{"summary", "farm", …}`` as the run wrote it."""


def store(folder: Path, figures: Figures, farm: dict[str, Any], **more: Any) -> None:
    document = {"summary": figures, "farm": farm, **more}
    (folder / SUMMARY).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def load(place: Path) -> Results:
    """``place`` is a folder of results, or a CSV of samples alone.

    Raises SamplesError for what cannot be read, MismatchError for what does not follow.
    """
    file = place / SAMPLES if place.is_dir() else place
    rows = samples.read(file)
    if not rows:
        raise SamplesError(f"{file}: no samples; the run made no request")
    figures = summarise(rows)
    stored = _stored(file.parent / SUMMARY) if place.is_dir() else None
    if stored is not None:
        try:
            compare(stored["summary"], figures)
        except MismatchError as error:
            raise MismatchError(f"{file.parent / SUMMARY}: {error}") from None
    return Results(rows, figures, stored)


def _stored(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if not {"summary", "farm"} <= set(document):
            raise ValueError("summary or farm is missing")
    except (OSError, ValueError, TypeError) as error:
        raise SamplesError(f"{file}: cannot be read: {error}") from None
    return document


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m loadtest.report", description="Recompute the table of a load test."
    )
    parser.add_argument("results", nargs="+", type=Path, help="folder of a run, or a samples CSV")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(arguments)
    try:
        loaded = {str(place): load(place) for place in options.results}
    except MismatchError as error:
        print(f"refused: {error}", file=sys.stderr)
        return REFUSED
    except SamplesError as error:
        print(f"report: {error}", file=sys.stderr)
        return UNREADABLE
    if options.json:
        print(json.dumps({place: results.figures for place, results in loaded.items()}, indent=2))
        return DONE
    console = Console()
    for place, results in loaded.items():
        console.print(f"[bold]{place}[/bold]: {len(results.rows)} samples", highlight=False)
        farm = results.stored["farm"] if results.stored else None
        render(results.figures, farm, console)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
