"""The whole farm's metrics: every worker's, joined, and what only the controller knows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

_SAMPLE = re.compile(r"^([A-Za-z_:][A-Za-z0-9_:]*)(\{(.*)\})?(\s.*)$")
_STATES = ("starting", "ready", "draining", "stopped", "failed")


def join(expositions: Mapping[str, str]) -> str:
    """Prometheus texts of several workers as one, each family once, each sample with the label
    ``worker`` of where it came from."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for worker, text in expositions.items():
        family = ""
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                head = heads.setdefault(family, [])
                kind = line[:7]
                if not any(old.startswith(kind) for old in head):
                    head.append(line)
            elif match := _SAMPLE.match(line):
                name = match[1]
                if not family or not name.startswith(family.removesuffix("_total")):
                    family = name
                samples.setdefault(family, []).append(_labelled(match, worker))
    parts = []
    for family in {**heads, **samples}:
        parts += [*heads.get(family, []), *samples.get(family, [])]
    return "".join(f"{part}\n" for part in parts)


def _labelled(match: re.Match[str], worker: str) -> str:
    name, _, labels, rest = match.groups()
    labels = labels or ""
    if re.search(r'(^|,)\s*worker="', labels):
        return f"{name}{{{labels}}}{rest}"
    own = f'worker="{worker}"'
    return f"{name}{{{labels.rstrip(',') + ',' if labels else ''}{own}}}{rest}"


def farm_metrics(
    view: Mapping[str, Any], replaced: Mapping[str, int], memory: Mapping[str, int]
) -> str:
    """The families that the controller measures itself."""
    states = Counter(worker["state"] for worker in view["workers"])
    blocks = [
        _family(
            "gpufarm_workers",
            "gauge",
            "Workers by state.",
            [(f'state="{state}"', states[state]) for state in _STATES],
        ),
        _family(
            "gpufarm_workers_desired",
            "gauge",
            "Workers that are wanted.",
            [("", view["count"])],
        ),
        _family(
            "gpufarm_worker_restarts_total",
            "counter",
            "Workers that were started again, by reason.",
            [(f'reason="{reason}"', replaced.get(reason, 0)) for reason in ("crash", "restart")],
        ),
        _family(
            "gpufarm_worker_startup_seconds",
            "gauge",
            "From the last start of a worker until it was ready.",
            [
                (f'worker="{worker["id"]}",phase="total"', worker["ready_seconds"])
                for worker in view["workers"]
                if worker["ready_seconds"] is not None
            ],
        ),
        _family(
            "gpufarm_worker_memory_bytes",
            "gauge",
            "Memory of a worker on its device (RAM on the CPU).",
            [(f'worker="{id_}"', size) for id_, size in memory.items()],
        ),
    ]
    return "".join(blocks)


def _family(name: str, kind: str, meaning: str, samples: Iterable[tuple[str, Any]]) -> str:
    lines = [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
    lines += [
        f"{name}{{{labels}}} {value}" if labels else f"{name} {value}" for labels, value in samples
    ]
    return "".join(f"{line}\n" for line in lines)
