"""What the serving layer costs: the time it adds to a request, and the throughput it leaves.

Workers that sleep for a known time run one request at a time, so the ideal is known as well:
``workers / service time`` requests a second, and a latency of the service time. Start a farm of
them and measure it:

    GPUFARM_MODEL__TARGET=loadtest.sleep_model:Sleep gpufarm up --workers 4
    python -m loadtest.dispatch_bench --url http://127.0.0.1:8000 --workers 4 --csv samples.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import uvloop

from loadtest.keepalive_client import Sample, closed_loop

WARM_UP_SECONDS = 1.0


def added(samples: Sequence[Sample], service: float) -> dict[str, float]:
    """Milliseconds that a lone request takes beyond its service time."""
    beyond_nominal = [1000 * (s.latency - service) for s in samples]
    result = {
        "added_ms_p50": statistics.median(beyond_nominal),
        "added_ms_p99": percentile(beyond_nominal, 99),
    }
    told = [1000 * (s.latency - s.inference) for s in samples if s.inference is not None]
    if told:
        # A sleep takes a little longer than asked for; this is without that.
        result["added_beyond_inference_ms_p50"] = statistics.median(told)
    return result


def share(samples: Sequence[Sample], workers: int, service: float) -> dict[str, float]:
    """Throughput as a share of what the workers could do, over the time that all were busy."""
    ends = sorted(sample.start + sample.latency for sample in samples)
    inner = [end for end in ends if ends[0] + WARM_UP_SECONDS <= end <= ends[-1] - 0.2]
    throughput = (len(inner) - 1) / (inner[-1] - inner[0])
    latencies = [1000 * sample.latency for sample in samples]
    return {
        "throughput_per_s": throughput,
        "share": throughput / (workers / service),
        "latency_ms_p50": statistics.median(latencies),
        "latency_ms_p99": percentile(latencies, 99),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between neighbours."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def write_csv(path: Path, runs: dict[str, Sequence[Sample]]) -> None:
    """Every raw sample; the column ``run`` tells which measurement it belongs to."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["run", *(field.name for field in fields(Sample))])
        writer.writeheader()
        for run, samples in runs.items():
            writer.writerows({"run": run, **asdict(sample)} for sample in samples)


async def measure(options: argparse.Namespace) -> dict[str, Sequence[Sample]]:
    url, body = f"{options.url}{options.path}", {"seconds": options.service_ms / 1000}
    await closed_loop(url, body, options.concurrency, WARM_UP_SECONDS)
    alone = await closed_loop(url, body, 1, options.seconds)
    full = await closed_loop(url, body, options.concurrency, options.seconds + WARM_UP_SECONDS)
    return {"alone": alone, "full": full}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one JSON object. Returns 1 when a request failed: then the numbers mean nothing."""
    parser = argparse.ArgumentParser(prog="loadtest.dispatch_bench", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--path", default="/predict")
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--service-ms", type=float, default=20.0)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(arguments)
    runs = uvloop.run(measure(options))
    if options.csv:
        write_csv(options.csv, runs)
    failed = sum(sample.status != 200 for samples in runs.values() for sample in samples)
    service = options.service_ms / 1000
    told = {
        "workers": options.workers,
        "service_ms": options.service_ms,
        "concurrency": options.concurrency,
        "requests": sum(len(samples) for samples in runs.values()),
        "failed": failed,
        **added(runs["alone"], service),
        **share(runs["full"], options.workers, service),
    }
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in told.items()}))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
