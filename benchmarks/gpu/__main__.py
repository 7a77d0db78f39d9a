"""Measure the demo voice on one GPU.

    python -m benchmarks.gpu --out DIR [--only SECTION …] [--device cpu --quick]

Exit codes: 0, all sections passed; 1, a section failed; 2, no CUDA device or a bad argument.
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
from benchmarks.gpu.job import BenchmarkError, Job, Outcome
from benchmarks.gpu.meter import Device, first_device
from benchmarks.gpu.section import run_section
from workers.models.voice.weights import DATA

TOTAL_SECONDS = 540.0
"""Seconds for all sections: a section that has not begun by then is not started."""
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


def run_sections(
    job: Job, sections: list[Section], seconds: float, environment: Mapping[str, str]
) -> Iterator[Outcome]:
    """Run each section within its own deadline and all within ``seconds``.

    A failed section does not stop those after it.
    """
    end = time.monotonic() + seconds
    for section in sections:
        deadline = min(section.deadline, end - time.monotonic())
        if deadline < 1:
            yield Outcome(section.name, f"not started: all {seconds:.0f} s are used up")
            continue
        print(f"{section.name} …", flush=True)
        own = replace(job, models=section.models, mps=section.mps)
        outcome = Outcome(section.name, deadline=deadline)
        try:
            with mps.daemon(environment) if section.mps else nullcontext(environment) as given:
                outcome = run_section(section.name, section.kind, own, deadline, given)
        except BenchmarkError as error:  # of the MPS daemon, before or after the section
            outcome.reason = "; ".join(filter(None, (outcome.reason, str(error))))
        yield outcome


def environment_of(job: Job, device: Device | None) -> dict[str, Any]:
    """Describe the machine and the versions of what is measured."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device.name if device else platform.processor() or platform.machine(),
        "memory": device.total if device else None,
        "driver": device.driver if device else None,
        "cuda": torch.version.cuda if device else None,
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
    parser.add_argument(
        "--quick", action="store_true", help="few and small runs, to try the command"
    )
    parser.add_argument("--only", nargs="+", choices=[section.name for section in SECTIONS])
    parser.add_argument("--weights", type=Path, default=DATA, help="the voice's folder")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all sections")
    return parser.parse_args()


def exit_on_sigterm(number: int, _frame: FrameType | None) -> None:
    """Exit as on an interrupt from the keyboard, so that every child is stopped on the way out."""
    raise SystemExit(128 + number)


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, exit_on_sigterm)
    device, environment = None, {**os.environ, "OMP_NUM_THREADS": "1"}
    if args.device == "cuda":
        if not torch.cuda.is_available():
            print("benchmarks.gpu needs a CUDA device; --device cpu --quick tries it without one")
            return 2
        try:
            device = first_device()
        except LookupError as error:
            print(f"benchmarks.gpu needs NVML beside CUDA: {error}")
            return 2
        # By UUID, as MPS requires and as the farm does; it is then CUDA's only device.
        environment["CUDA_VISIBLE_DEVICES"] = device.uuid
    logs = args.out.resolve() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    job = Job(
        device="cuda:0" if device else "cpu",
        weights=str(args.weights.resolve()),
        logs=str(logs),
        quick=args.quick,
        uuid=device.uuid if device else "",
    )
    chosen = [
        section
        for section in SECTIONS
        if (device or not section.only_gpu) and (not args.only or section.name in args.only)
    ]
    found = environment_of(job, device)
    with tempfile.TemporaryDirectory(prefix="gpufarm-benchmark-") as cache:
        # With TensorRT, the first voice builds its engine and the others read it.
        environment.setdefault("GPUFARM_CACHE_DIR", cache)
        outcomes: list[Outcome] = []
        for outcome in run_sections(job, chosen, args.seconds, environment):
            # An early end leaves the results of the sections before it.
            outcomes.append(outcome)
            report.write(args.out, found, outcomes)
    table = report.text(found, outcomes)
    print(f"\n{table}\n{args.out}: results.json, table.txt, a CSV file a table, logs")
    return 0 if outcomes and all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
