"""``python -m loadtest.stepped`` (``make loadtest``): a stepped run against a farm, and its table.

Takes the farm at --host, else the one that runs, else starts one and stops it again afterwards.
Exit codes: 0 done, 1 a request failed or a threshold was exceeded, 2 arguments, 4 no farm there;
what `gpufarm up` ends with where it cannot start one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from loadtest import arguments, report, samples, texts
from loadtest.farm import NoFarmError, describe
from loadtest.own_farm import StartError, running_or_new
from loadtest.samples import OK, Sample, SamplesError
from loadtest.summary import Figures, MismatchError
from loadtest.table import render
from loadtest.thresholds import THRESHOLDS, judge_figures

DONE, FAILED, BAD_ARGUMENTS, NO_FARM, INTERRUPTED = 0, 1, 2, 4, 130
LOCUSTFILE = Path(__file__).resolve().parent / "locustfile.py"
_NOT_FOUND = ("404", "404 not_found")
_OTHER_REQUEST = {
    arguments.SPEECH: "for a model with predict() use --request predict",
    arguments.STREAM: "for a model with predict() use --request predict",
    arguments.PREDICT: "for a model with speak() use --request speech or stream",
}


class RunError(Exception):
    """The run did not come to its end; the message says why."""


def parser() -> argparse.ArgumentParser:
    """The command's arguments; those of Locust that it passes on have the same names."""
    made = arguments.Parser(
        prog="python -m loadtest.stepped",
        description="Load a farm with 1, 2, 4, 8, 16 users, and print the figures.",
    )
    made.add_argument("--host", metavar="URL", help="default: the farm that runs, or a new one")
    made.add_argument(
        "--steps",
        type=arguments.some_steps_text,
        default="1,2,4,8,16",
        metavar="USERS,…",
        help="numbers of users, one step after the other (1,2,4,8,16)",
    )
    made.add_argument(
        "--seconds",
        type=arguments.positive,
        default=110.0,
        help="of all steps together, shared out equally: 110, the default, is 22 for each of five",
    )
    made.add_argument(
        "--warm-up", type=arguments.positive, default=10.0, help="seconds before them, kept apart"
    )
    made.add_argument("--name", help="folder under --results; default: date and time")
    made.add_argument(
        "--results", type=Path, default=Path("loadtest/results"), help="default: loadtest/results"
    )
    made.add_argument("--keep", action="store_true", help="leave a farm running that was started")
    made.add_argument(
        "--timeout", type=arguments.positive, default=70.0, help="seconds for a request (70)"
    )
    for option, what in THRESHOLDS.items():
        name, help_text = "--" + option.replace("_", "-"), f"{what}; exit code 1 beyond it"
        made.add_argument(name, type=arguments.limit_text, metavar="LIMIT", help=help_text)
    _add_passed_on(made.add_argument_group("as Locust's, see loadtest/README.md"))
    return made


def _add_passed_on(group: argparse._ArgumentGroup) -> None:
    """Locust checks them too, but reports errors only in its log."""
    requests = [arguments.SPEECH, arguments.STREAM, arguments.PREDICT]
    group.add_argument("--request", choices=requests, default=arguments.SPEECH)
    group.add_argument("--loop", choices=[arguments.CLOSED, arguments.OPEN])
    group.add_argument("--text", choices=[texts.MIXED, *texts.GROUPS])
    group.add_argument("--texts", metavar="FILE")
    group.add_argument("--predict-body", type=arguments.json_text, metavar="JSON")
    group.add_argument("--predict-path")
    group.add_argument("--arrivals", type=arguments.positive, metavar="PER_SECOND")
    group.add_argument("--seed", type=int)


def main(words: Sequence[str] | None = None) -> int:
    options = parser().parse_args(words)
    console = Console()
    try:
        if options.texts is not None:
            texts.load(Path(options.texts))
        with _farm(options, console) as url:
            return _run(url, options, console)
    except texts.TextsError as error:
        code, message = BAD_ARGUMENTS, str(error)
    except NoFarmError as error:
        code, message = NO_FARM, str(error)
    except StartError as error:
        code, message = error.code, str(error)
    except (RunError, SamplesError, MismatchError, OSError) as error:
        code, message = FAILED, str(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    _complain(message)
    return code


def _complain(message: str) -> None:
    print(f"stepped: {message}", file=sys.stderr)


@contextmanager
def _farm(options: argparse.Namespace, console: Console) -> Iterator[str]:
    """The address of a farm that serves. One that was started here is stopped here."""
    if options.host:
        yield options.host.rstrip("/")
        return
    with running_or_new(options.keep, console.print) as url:
        yield url


def _run(url: str, options: argparse.Namespace, console: Console) -> int:
    before = describe(url)
    folder = options.results / (options.name or time.strftime("%Y%m%d-%H%M%S"))
    folder.mkdir(parents=True, exist_ok=True)
    # Every worker is asked at least once before anything is counted.
    users = max(len(before["workers"]), 1)
    warm_up = ["-u", str(users), "-r", "100", "-t", f"{max(round(options.warm_up), 1)}s"]
    warm_up += ["--samples", str(folder / report.WARM_UP), *_passed_on(options)]
    _locust(url, options, warm_up, folder, ("warm-up", options.warm_up))
    seconds = options.seconds / len(arguments.steps(options.steps))
    load = ["--steps", options.steps, "--step-seconds", f"{seconds:.3f}"]
    load += ["--samples", str(folder / report.SAMPLES), "--html", str(folder / "locust.html")]
    load += ["--csv", str(folder / "locust"), *_passed_on(options)]
    # Failures are checked below, from the samples, so that 1 means that Locust itself failed.
    load += ["--max-failure-share", "1"]
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
    if code:
        _complain(f"locust ended with {code}: see {folder / 'locust.log'}")
    return max(code, _judge(options, results.rows, results.figures["total"]))


def _judge(options: argparse.Namespace, rows: Sequence[Sample], total: Figures) -> int:
    """The exit code; each reason for 1 is printed on a line of its own."""
    verdicts = judge_figures(options, total)
    wrong = [f"threshold {verdict}" for verdict in verdicts if not verdict.held]
    failures = Counter(sample.error for sample in rows if sample.outcome == samples.FAILED)
    if failures:
        ((reason, _),) = failures.most_common(1)
        hint = f"; {_OTHER_REQUEST[options.request]}" if reason in _NOT_FOUND else ""
        _complain(f"{failures.total()} of {len(rows)} requests failed, most often: {reason}{hint}")
    for line in wrong:
        _complain(line)
    # Without a threshold for failures, none is allowed.
    allowed = any(verdict.option == "max_failure_share" for verdict in verdicts)
    return FAILED if wrong or (failures and not allowed) else DONE


def _passed_on(options: argparse.Namespace) -> list[str]:
    words = []
    names = ("request", "loop", "text", "texts", "predict_body", "predict_path", "arrivals", "seed")
    for name in names:
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
