"""What the serving layer costs: the time it adds to a request, and the throughput it leaves.

Workers that sleep for a known time run one request at a time, so the ideal is known as well:
``workers / service time`` requests a second, and a latency of the service time.

    python -m loadtest.dispatch_bench --workers 4 --csv samples.csv

starts a farm of them in a temporary folder and stops it again. A farm elsewhere is named by
``--host``; it has to serve the same model:

    GPUFARM_MODEL__TARGET=loadtest.sleep_model:Sleep gpufarm up --workers 4

Exit codes: 0 done, 1 a request failed or no farm could be started, 2 arguments (or whatever
`gpufarm up` ends with), 4 no farm there. Figures are printed with 0 only.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import httpx
import uvloop

from loadtest import arguments
from loadtest.farm import NoFarmError
from loadtest.keepalive_client import GRACE_SECONDS, Sample, closed_loop
from loadtest.own_farm import SLEEP_MODEL, StartError, sleepers

WARM_UP_SECONDS = 1.0
FAILED, NO_FARM, INTERRUPTED = 1, 4, 130
_SLEEPS = "/predict"


class BenchError(Exception):
    """There are no figures; the message says why, and what to do."""


def added(samples: Sequence[Sample], service: float) -> dict[str, float]:
    """Milliseconds that a single request takes beyond its service time."""
    beyond_nominal = [1000 * (s.latency - service) for s in samples]
    result = {
        "added_ms_p50": statistics.median(beyond_nominal),
        "added_ms_p99": percentile(beyond_nominal, 99),
    }
    beyond = [1000 * (s.latency - s.inference) for s in samples if s.inference is not None]
    if beyond:
        # A sleep takes a little longer than asked for; this is without that.
        result["added_beyond_inference_ms_p50"] = statistics.median(beyond)
    return result


def share(samples: Sequence[Sample], workers: int, service: float) -> dict[str, float]:
    """Throughput as a share of what the workers could do, over the time that all were busy."""
    ends = sorted(sample.start + sample.latency for sample in samples)
    inner = [end for end in ends if ends[0] + WARM_UP_SECONDS <= end <= ends[-1] - 0.2]
    if len(inner) < 2:
        raise BenchError(
            f"{len(samples)} requests are too few to tell a throughput: make --seconds longer"
        )
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
    """Every raw sample; the column ``run`` says which measurement it belongs to."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["run", *(field.name for field in fields(Sample))])
        writer.writeheader()
        for run, samples in runs.items():
            writer.writerows({"run": run, **asdict(sample)} for sample in samples)


@contextmanager
def farm(options: argparse.Namespace) -> Iterator[str]:
    """The address of the farm to be measured: --host, or one for this run."""
    if options.host is not None:
        yield options.host.rstrip("/")
        return
    with sleepers(options.workers, lambda line: print(line, file=sys.stderr)) as url:
        yield url


def check_served(url: str, path: str, seconds: float) -> None:
    """One request, before many: raises NoFarmError or BenchError where it is not answered by a
    server that holds its worker for as long as the request says."""
    needed = (
        f"a farm that serves {SLEEP_MODEL} is needed: without --host one is started, or "
        f"GPUFARM_MODEL__TARGET={SLEEP_MODEL} gpufarm up"
    )
    try:
        answer = httpx.post(
            url + path, json={"seconds": seconds}, timeout=seconds + GRACE_SECONDS, trust_env=False
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = f"{type(error).__name__}: {error}"
        raise NoFarmError(f"no farm answers at {url} ({reason}); {needed}") from None
    if answer.status_code != 200:
        raise BenchError(f"{url}{path} answers {answer.status_code}; {needed}")
    if path == _SLEEPS and b'"slept"' not in answer.content:
        raise BenchError(f"{url}{path} answers, but has not slept; {needed}")


def run(url: str, options: argparse.Namespace) -> dict[str, float]:
    """All figures. Raises BenchError, or NoFarmError, rather than figures that mean nothing."""
    service = options.service_ms / 1000
    check_served(url, options.path, service)
    try:
        runs = uvloop.run(measure(url, options))
    except (OSError, TimeoutError) as error:
        reason = str(error) or f"an answer took longer than {GRACE_SECONDS:g} s"
        raise BenchError(f"{url} did not last to the end: {reason}; no figures") from None
    if options.csv:
        write_csv(options.csv, runs)
    everything = [sample for samples in runs.values() for sample in samples]
    statuses = Counter(sample.status for sample in everything if sample.status != 200)
    if statuses:
        ((status, _),) = statuses.most_common(1)
        raise BenchError(
            f"{statuses.total()} of {len(everything)} requests failed, most often with status "
            f"{status}; no figures (`gpufarm logs` of that farm says more)"
        )
    if not runs["alone"] or not runs["full"]:
        raise BenchError("no request was answered in time: make --seconds longer")
    return {
        "workers": options.workers,
        "service_ms": options.service_ms,
        "concurrency": options.concurrency,
        "requests": len(everything),
        "failed": 0,
        **added(runs["alone"], service),
        **share(runs["full"], options.workers, service),
    }


async def measure(url: str, options: argparse.Namespace) -> dict[str, Sequence[Sample]]:
    address, body = url + options.path, {"seconds": options.service_ms / 1000}
    await closed_loop(address, body, options.concurrency, WARM_UP_SECONDS)
    alone = await closed_loop(address, body, 1, options.seconds)
    full = await closed_loop(address, body, options.concurrency, options.seconds + WARM_UP_SECONDS)
    return {"alone": alone, "full": full}


def parser() -> argparse.ArgumentParser:
    made = arguments.Parser(
        prog="python -m loadtest.dispatch_bench",
        description="What the serving layer adds to a request, and what it leaves of the workers.",
    )
    farm_help = f"a farm that serves {SLEEP_MODEL}; default: one for this run"
    made.add_argument("--host", metavar="URL", help=farm_help)
    made.add_argument("--path", default=_SLEEPS, help="of another server that takes --service-ms")
    made.add_argument("--workers", type=arguments.count, required=True, help="that the farm has")
    made.add_argument(
        "--service-ms", type=arguments.positive, default=20.0, help="that each request takes (20)"
    )
    made.add_argument("--concurrency", type=arguments.count, default=8, help="clients (8)")
    made.add_argument(
        "--seconds", type=arguments.positive, default=10.0, help="each of the two runs (10)"
    )
    made.add_argument("--csv", type=Path, metavar="FILE", help="write every request's times")
    return made


def main(words: Sequence[str] | None = None) -> int:
    """Print one JSON object; see this module's beginning for what is returned."""
    options = parser().parse_args(words)
    try:
        with farm(options) as url:
            figures = run(url, options)
    except NoFarmError as error:
        code, message = NO_FARM, str(error)
    except StartError as error:
        code, message = error.code, str(error)
    except (BenchError, OSError) as error:
        code, message = FAILED, str(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    else:
        print(
            json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()})
        )
        return 0
    print(f"dispatch_bench: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
