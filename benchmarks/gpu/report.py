"""The report: a table on the screen, JSON and CSV files in a folder."""

from __future__ import annotations

import csv
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.job import Outcome, Row

MIB = 1 << 20
ONLY_CSV = ("requests", "memory")
"""Tables of too many rows for the JSON file."""
NOT_MEASURED = "not measured"


def by_table(outcomes: Iterable[Outcome]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for outcome in outcomes:
        for row in outcome.rows:
            found[row["table"]].append({k: v for k, v in row.items() if k != "table"})
    return dict(found)


def speeds(tables: dict[str, list[Row]]) -> list[Row]:
    """Return the medians of each model and mode, and their share of the memory bandwidth."""
    copied = [row["bytes_per_second"] for row in tables.get("bandwidth", [])]
    bandwidth = statistics.median(copied) if copied else None
    rounds: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in tables.get("speed", []):
        rounds[row["model"], row["mode"]].append(row)
    found = []
    for (model, mode), rows in rounds.items():
        frames = [row["frames_per_second"] for row in rows]
        middle = statistics.median(frames)
        read = middle * rows[0]["bytes_per_frame"]
        found.append(
            {
                "model": model,
                "mode": mode,
                "engine": rows[0]["engine"],
                "rounds": len(rows),
                "frames_per_second": middle,
                "least": min(frames),
                "most": max(frames),
                "codes_per_second": statistics.median(row["codes_per_second"] for row in rows),
                "bytes_per_frame": rows[0]["bytes_per_frame"],
                "bytes_per_second": read,
                "copy_bytes_per_second": bandwidth,
                "share_of_bandwidth": read / bandwidth if bandwidth else None,
            }
        )
    return found


def write(folder: Path, environment: dict[str, Any], outcomes: list[Outcome]) -> None:
    """Write ``results.json``, ``table.txt``, and a CSV file for each table."""
    tables = by_table(outcomes)
    sections = [
        {
            "name": o.name,
            "passed": o.passed,
            "reason": o.reason,
            "seconds": round(o.seconds, 2),
            "deadline": o.deadline,
        }
        for o in outcomes
    ]
    whole = {
        "environment": environment,
        "sections": sections,
        "speeds": speeds(tables),
        "tables": {name: rows for name, rows in tables.items() if name not in ONLY_CSV},
        "only_in_csv": {name: len(tables.get(name, [])) for name in ONLY_CSV},
    }
    (folder / "results.json").write_text(json.dumps(whole, indent=1) + "\n")
    for name, rows in tables.items():
        with (folder / f"{name}.csv").open("w", newline="") as out:
            columns = list(dict.fromkeys(column for row in rows for column in row))
            writer = csv.DictWriter(out, columns)
            writer.writeheader()
            writer.writerows(rows)
    (folder / "table.txt").write_text(text(environment, outcomes))


def text(environment: dict[str, Any], outcomes: list[Outcome]) -> str:
    """Format the results as text tables."""
    tables = by_table(outcomes)
    parts = ["  ".join(f"{name} {value}" for name, value in environment.items() if value)]
    for title, rows in (
        ("Speed of one decoder, batch 1 (medians)", _speed(tables)),
        ("Worker processes on one device, in a closed loop", _workers(tables)),
        ("Memory of a worker with the whole voice (MiB)", _footprint(tables)),
        ("The codec's decoder", _codec(tables)),
        ("Sections", [_section(outcome) for outcome in outcomes]),
    ):
        parts.append(f"\n{title}\n{columns(rows) if rows else NOT_MEASURED}")
    return "\n".join(parts) + "\n"


def columns(rows: list[dict[str, str]]) -> str:
    """Format rows under their column names, aligned to the right."""
    names = list(rows[0])
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    lines = ["  ".join(name.rjust(widths[name]) for name in names)]
    lines += ["  ".join(row[name].rjust(widths[name]) for name in names) for row in rows]
    return "\n".join(lines)


def _speed(tables: dict[str, list[Row]]) -> list[dict[str, str]]:
    sizes = {row["model"]: row["parameters"] for row in tables.get("models", [])}
    return [
        {
            "model": f"{row['model']} ({sizes.get(row['model'], 0) / 1e6:.0f} M)",
            "mode": row["mode"],
            "runs": row["engine"],
            "n": str(row["rounds"]),
            "frames/s": f"{row['frames_per_second']:.1f}",
            "range": f"{row['least']:.1f}-{row['most']:.1f}",
            "codes/s": f"{row['codes_per_second']:.0f}",
            "MB/frame": f"{row['bytes_per_frame'] / 1e6:.1f}",
            "GB/s": f"{row['bytes_per_second'] / 1e9:.1f}",
            "of copying": _share(row),
        }
        for row in speeds(tables)
    ]


def _share(row: Row) -> str:
    share, copied = row["share_of_bandwidth"], row["copy_bytes_per_second"]
    return NOT_MEASURED if share is None else f"{100 * share:.1f} % of {copied / 1e9:.0f} GB/s"


def _workers(tables: dict[str, list[Row]]) -> list[dict[str, str]]:
    rows = tables.get("workers", [])
    alone = {
        (r["model"], r["mode"], r["pinned"]): r["frames_per_second"]
        for r in rows
        if r["workers"] == 1
    }
    return [
        {
            "model": row["model"],
            "mode": row["mode"] + (f" (attached {row['attached']})" if row["attached"] else ""),
            "pinned": "yes" if row["pinned"] else "no",
            "workers": str(row["workers"]),
            "frames/s": f"{row['frames_per_second']:.1f}",
            "times one": f"{row['frames_per_second'] / one:.2f}"
            if (one := alone.get((row["model"], row["mode"], row["pinned"])))
            else "",
            "p50 ms": f"{1000 * row['p50']:.1f}",
            "p95 ms": f"{1000 * row['p95']:.1f}",
            "n": str(row["requests"]),
            "W": f"{row['watts']:.0f}" if "watts" in row else "",
            "SM MHz": f"{row['sm_mhz']:.0f}" if "sm_mhz" in row else "",
        }
        for row in rows
    ]


def _footprint(tables: dict[str, list[Row]]) -> list[dict[str, str]]:
    def mib(value: int | None) -> str:
        return NOT_MEASURED if value is None else f"{value / MIB:.0f}"

    return [
        {
            "worker": str(row["worker"]),
            "peak": mib(row["peak"]),
            "steady": mib(row["steady"]),
            "torch reserved": mib(row["torch_reserved"]),
            "beside torch": mib(row["not_torch"]),
            "ready after s": f"{row['ready_seconds']:.1f}",
            "samples": str(row["samples"]),
        }
        for row in tables.get("footprint", [])
    ]


def _codec(tables: dict[str, list[Row]]) -> list[dict[str, str]]:
    return [
        {
            "provider": row["provider"],
            "nodes": ", ".join(f"{n} on {name}" for name, n in row["nodes"].items())
            or "not reported",
            "providers skipped": "; ".join(row["fallback"]) or "none",
        }
        for row in tables.get("codec", [])
    ]


def _section(outcome: Outcome) -> dict[str, str]:
    return {
        "section": outcome.name,
        "seconds": f"{outcome.seconds:.1f} of {outcome.deadline:.0f}",
        "result": "done" if outcome.passed else f"FAILED: {outcome.reason}",
    }
