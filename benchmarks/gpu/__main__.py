"""Prove on one machine what is claimed of GPUs.

    python -m benchmarks.gpu --out DIR [--only SECTION …] [--device cpu --quick]

Exit codes: 0, all sections done; 1, one has failed; 2, there is no CUDA device, or a bad argument.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.gpu import mps, report
from benchmarks.gpu.job import Job, Outcome, ProofError
from benchmarks.gpu.meter import Card, first_card
from benchmarks.gpu.section import carry_out
from workers.models.voice.weights import DATA

WHOLE = 540.0
"""Seconds for everything: what has not begun by then does not begin."""
DISTRIBUTIONS = ("torch", "onnxruntime", "onnxruntime-gpu", "numpy", "safetensors", "nvidia-ml-py")


@dataclass(frozen=True)
class Section:
    name: str
    kind: str
    deadline: float
    models: tuple[str, ...] = ("voice",)
    mps: bool = False
    only_gpu: bool = False


SECTIONS = (
    Section("speed", "speed", 60),
    Section("bandwidth", "bandwidth", 40),
    Section("footprint", "footprint", 70),
    Section("workers", "workers", 90),
    Section("workers-mps", "workers", 90, mps=True, only_gpu=True),
    Section("speed-large", "speed", 70, ("large",), only_gpu=True),
    Section("workers-large", "workers", 90, ("large",), only_gpu=True),
    Section("workers-large-mps", "workers", 90, ("large",), mps=True, only_gpu=True),
)


def carry_out_all(
    job: Job, sections: list[Section], seconds: float, environment: Mapping[str, str]
) -> Iterator[Outcome]:
    """Each within its own deadline and all within ``seconds``; a failure stops none of the rest."""
    end = time.monotonic() + seconds
    for section in sections:
        deadline = min(section.deadline, end - time.monotonic())
        if deadline < 1:
            yield Outcome(section.name, f"not begun: {seconds:.0f} s are over")
            continue
        print(f"{section.name} …", flush=True)
        own = replace(job, models=section.models, mps=section.mps)
        outcome = Outcome(section.name, deadline=deadline)
        try:
            with mps.daemon(environment) if section.mps else nullcontext(environment) as given:
                outcome = carry_out(section.name, section.kind, own, deadline, given)
        except ProofError as error:  # of the daemon: before the section, or after it
            outcome.reason = "; ".join(filter(None, (outcome.reason, str(error))))
        yield outcome


def environment_of(job: Job, card: Card | None) -> dict[str, Any]:
    """Where and with what it was measured."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": card.name if card else platform.processor() or platform.machine(),
        "memory": card.total if card else None,
        "driver": card.driver if card else None,
        "cuda": torch.version.cuda if card else None,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "quick": job.quick,
        **{name: version(name) for name in DISTRIBUTIONS},
    }


def version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="where results are written")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="few and small: tries the script")
    parser.add_argument("--only", nargs="+", choices=[section.name for section in SECTIONS])
    parser.add_argument("--weights", type=Path, default=DATA, help="the voice's folder")
    parser.add_argument("--seconds", type=float, default=WHOLE, help="for everything")
    return parser.parse_args()


def leave(number: int, _frame: FrameType | None) -> None:
    """As an interrupt from the keyboard: what was started is stopped on the way out."""
    raise SystemExit(128 + number)


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, leave)
    card, environment = None, {**os.environ, "OMP_NUM_THREADS": "1"}
    if args.device == "cuda":
        if not torch.cuda.is_available():
            print("gpu_proof needs a CUDA device; --device cpu --quick tries it without one")
            return 2
        try:
            card = first_card()
        except LookupError as error:
            print(f"gpu_proof needs NVML beside CUDA: {error}")
            return 2
        # By its own name, as MPS demands and as the farm does; then it is CUDA's only device.
        environment["CUDA_VISIBLE_DEVICES"] = card.uuid
    logs = args.out.resolve() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    job = Job(
        device="cuda:0" if card else "cpu",
        weights=str(args.weights.resolve()),
        logs=str(logs),
        quick=args.quick,
        uuid=card.uuid if card else "",
    )
    chosen = [
        section
        for section in SECTIONS
        if (card or not section.only_gpu) and (not args.only or section.name in args.only)
    ]
    found = environment_of(job, card)
    with tempfile.TemporaryDirectory(prefix="gpufarm-proof-") as cache:
        # Where TensorRT is at hand, the first voice builds its engine and the others read it.
        environment.setdefault("GPUFARM_CACHE_DIR", cache)
        outcomes: list[Outcome] = []
        for outcome in carry_out_all(job, chosen, args.seconds, environment):
            # Whoever ends this early has what was found until then.
            outcomes.append(outcome)
            report.write(args.out, found, outcomes)
    table = report.text(found, outcomes)
    print(f"\n{table}\n{args.out}: results.json, table.txt, a CSV file a table, logs")
    return 0 if outcomes and all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
