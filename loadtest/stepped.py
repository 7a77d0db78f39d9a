"""``python -m loadtest.stepped`` (``make loadtest``): a stepped run against a farm, and its table.

Takes the farm at --host, else the one that runs, else starts one and stops it again afterwards.
Exit codes: 0 done, 1 a request failed or a threshold was exceeded, 2 arguments, 4 no farm there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from loadtest import arguments, report, samples
from loadtest.farm import NoFarmError, describe
from loadtest.samples import OK, SamplesError
from loadtest.summary import MismatchError
from loadtest.table import render

FAILED, NO_FARM, INTERRUPTED = 1, 4, 130
LOCUSTFILE = Path(__file__).resolve().parent / "locustfile.py"
_THRESHOLDS = ("max_latency_ms", "max_failure_share", "max_refused_share", "max_real_time_factor")


class RunError(Exception):
    """The run did not come to its end; the message says why."""


def parser() -> argparse.ArgumentParser:
    """The command's arguments; those of Locust that it passes on have the same names."""
    made = argparse.ArgumentParser(
        prog="python -m loadtest.stepped",
        description="Load a farm with 1, 2, 4, 8, 16 users, and tell what came of it.",
    )
    made.add_argument("--host", metavar="URL", help="default: the farm that runs, or a new one")
    made.add_argument("--steps", type=arguments.steps_text, default="1,2,4,8,16")
    made.add_argument(
        "--seconds", type=arguments.positive, default=110.0, help="all steps together (110)"
    )
    made.add_argument(
        "--warm-up", type=arguments.positive, default=10.0, help="seconds before them, kept apart"
    )
    made.add_argument("--name", help="folder under --results; default: date and time")
    made.add_argument("--results", type=Path, default=Path("loadtest/results"))
    made.add_argument("--keep", action="store_true", help="leave a farm running that was started")
    for name, choices in (
        ("--request", [arguments.SPEECH, arguments.STREAM, arguments.PREDICT]),
        ("--loop", [arguments.CLOSED, arguments.OPEN]),
    ):
        made.add_argument(name, choices=choices)
    for name in ("--text", "--texts", "--predict-body", "--predict-path", "--arrivals", "--seed"):
        made.add_argument(name, help=f"as Locust's {name}")
    made.add_argument("--timeout", type=arguments.positive, default=70.0)
    for name in _THRESHOLDS:
        option = "--" + name.replace("_", "-")
        made.add_argument(option, type=arguments.limit_text, help="exit code 1 beyond it")
    return made


def main(words: Sequence[str] | None = None) -> int:
    options = parser().parse_args(words)
    console = Console()
    try:
        with _farm(options, console) as url:
            return _run(url, options, console)
    except NoFarmError as error:
        print(f"stepped: {error}", file=sys.stderr)
        return NO_FARM
    except (RunError, SamplesError, MismatchError, OSError) as error:
        print(f"stepped: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


@contextmanager
def _farm(options: argparse.Namespace, console: Console) -> Iterator[str]:
    """The address of a farm that serves. One that was started here is stopped here."""
    if options.host:
        yield options.host.rstrip("/")
        return
    running = _gpufarm("ps", "--json")
    if running is not None:
        yield running["url"]
        return
    console.print("no farm is running; starting one")
    started = _gpufarm("up", "--json", loud=True)
    if started is None:
        raise RunError("`gpufarm up` failed; what it said stands above")
    try:
        yield started["url"]
    finally:
        if not options.keep:
            subprocess.run([*_command(), "down"], check=False)


def _command() -> list[str]:
    beside = Path(sys.executable).with_name("gpufarm")
    found = str(beside) if beside.exists() else shutil.which("gpufarm")
    return [found] if found else [sys.executable, "-m", "launcher.command.cli"]


def _gpufarm(*words: str, loud: bool = False) -> dict[str, Any] | None:
    """What the command prints as JSON; None where it fails. ``loud``: its messages are shown."""
    messages = None if loud else subprocess.DEVNULL
    done = subprocess.run(
        [*_command(), *words], stdout=subprocess.PIPE, stderr=messages, text=True, check=False
    )
    if done.returncode:
        return None
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def _run(url: str, options: argparse.Namespace, console: Console) -> int:
    before = describe(url)
    folder = options.results / (options.name or time.strftime("%Y%m%d-%H%M%S"))
    folder.mkdir(parents=True, exist_ok=True)
    numbers = arguments.steps(options.steps)
    if not numbers:
        raise RunError("--steps is empty; numbers of users are needed, such as 1,2,4,8,16")
    # Every worker is asked at least once while nobody counts.
    users = max(len(before["workers"]), 1)
    warm_up = ["-u", str(users), "-r", "100", "-t", f"{max(round(options.warm_up), 1)}s"]
    warm_up += ["--samples", str(folder / report.WARM_UP), *_passed_on(options, [])]
    _locust(url, options, warm_up, folder, ("warm-up", options.warm_up))
    seconds = options.seconds / len(numbers)
    load = ["--steps", options.steps, "--step-seconds", f"{seconds:.3f}"]
    load += ["--samples", str(folder / report.SAMPLES), "--html", str(folder / "locust.html")]
    load += ["--csv", str(folder / "locust"), *_passed_on(options, _THRESHOLDS)]
    code = _locust(url, options, load, folder, (f"users {options.steps}", options.seconds))
    farm = describe(url)
    results = report.load(folder / report.SAMPLES)
    report.store(folder, results.figures, farm, farm_before=before, arguments=sys.argv[1:])
    render(results.figures, farm, console)
    if [worker["id"] for worker in farm["workers"]] != [w["id"] for w in before["workers"]]:
        console.print("[yellow]the workers changed during the run: see farm_before[/yellow]")
    warm = [sample for sample in samples.read(folder / report.WARM_UP) if sample.outcome == OK]
    slowest = f", slowest {max(sample.latency_ms for sample in warm):.0f} ms" if warm else ""
    console.print(f"warm-up, not counted: {len(warm)} answered{slowest}", highlight=False)
    console.print(f"results: {folder} (samples.csv, locust.html)", soft_wrap=True, highlight=False)
    return code


def _passed_on(options: argparse.Namespace, thresholds: Sequence[str]) -> list[str]:
    names = ["request", "loop", "text", "texts", "predict_body", "predict_path", "arrivals", "seed"]
    words = []
    for name in [*names, *thresholds]:
        value = getattr(options, name)
        if value not in (None, ""):
            words += ["--" + name.replace("_", "-"), str(value)]
    return words


def _locust(
    url: str,
    options: argparse.Namespace,
    words: list[str],
    folder: Path,
    phase: tuple[str, float],
) -> int:
    """Run Locust to its end. Returns its exit code, 0 or 1; raises RunError where it is neither."""
    command = [sys.executable, "-P", "-m", "locust", "-f", str(LOCUSTFILE), "--headless"]
    command += ["--host", url, "--only-summary", "--timeout", str(options.timeout), *words]
    # What is under way when the last step ends may finish: dropping it would drop the slowest.
    command += ["--stop-timeout", f"{round(options.timeout) + 1}s"]
    log = folder / "locust.log"
    with log.open("a", encoding="utf-8") as lines:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=lines, stderr=lines)
        try:
            _watch(process, *phase)
        finally:
            _end(process)
    if process.returncode not in (0, FAILED):
        last = log.read_text(encoding="utf-8").strip().rsplit("\n", 1)[-1]
        raise RunError(f"locust ended with {process.returncode}: {last} (all of it: {log})")
    return process.returncode


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _watch(process: subprocess.Popen[bytes], name: str, seconds: float) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    started = time.monotonic()
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(name, total=seconds)
        while process.poll() is None:
            progress.update(task, completed=min(time.monotonic() - started, seconds))
            try:
                process.wait(timeout=0.25)
            except subprocess.TimeoutExpired:
                continue


if __name__ == "__main__":
    sys.exit(main())
