"""Arguments: Locust's custom ones (on its page, too, but for files), and how they are checked."""

from __future__ import annotations

import json
import math
from argparse import ArgumentParser, ArgumentTypeError
from typing import Any, NoReturn

from loadtest.texts import GROUPS, MIXED, OWN_FILE

SPEECH, STREAM, PREDICT = "speech", "stream", "predict"
CLOSED, OPEN = "closed", "open"


class Parser(ArgumentParser):
    """Of our own commands: a bad argument is one line, and --help lists the rest."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the arguments)\n")


def add_to(parser: Any) -> None:
    """Add them to Locust's parser."""
    _add_requests(parser.add_argument_group("What the farm is asked"))
    _add_load(parser.add_argument_group("How the load comes"))
    _add_thresholds(
        parser.add_argument_group(
            "Thresholds", "Exit code 1 when one is exceeded. Empty: not checked."
        )
    )
    _add(
        parser,
        "--samples",
        metavar="FILE",
        default="",
        on_page=False,
        help="write one CSV row for every request; on the master, those of all its workers",
    )


def _add(group: Any, name: str, *, on_page: bool = True, **options: Any) -> None:
    """As Locust's parser does it; its groups do not know what is shown on the page."""
    group.add_argument(name, **options).include_in_web_ui = on_page


def _add_requests(group: Any) -> None:
    _add(
        group,
        "--request",
        choices=[SPEECH, STREAM, PREDICT],
        default=SPEECH,
        help="what FarmUser sends: speech (whole), stream (speech as pcm while it is made) or "
        "predict (--predict-body)",
    )
    _add(
        group,
        "--text",
        choices=[MIXED, *GROUPS],
        default=MIXED,
        help="length of the texts to be spoken",
    )
    _add(
        group,
        "--texts",
        metavar="FILE",
        default=str(OWN_FILE),
        on_page=False,
        help="file of the texts",
    )
    _add(group, "--model", default="default", help="the model's name in speech requests")
    _add(group, "--voice", default="default", help="the voice in speech requests")
    _add(
        group,
        "--audio-format",
        choices=["wav", "flac", "mp3", "opus"],
        default="wav",
        help="of speech that is not streamed",
    )
    _add(group, "--predict-path", default="/predict", help="path of predict requests")
    _add(
        group, "--predict-body", type=json_text, default="{}", help="JSON body of predict requests"
    )
    _add(
        group,
        "--timeout",
        type=positive,
        default=70.0,
        metavar="SECONDS",
        help="seconds after which a request is given up; more than the farm's own deadline of 60",
    )
    _add(group, "--seed", type=int, default=1, help="of the choice of texts and of random arrivals")


def _add_load(group: Any) -> None:
    _add(
        group,
        "--loop",
        choices=[CLOSED, OPEN],
        default=CLOSED,
        help="closed: a user waits for the answer before asking again. open: a user starts "
        "--arrivals requests a second, whether or not answers come",
    )
    _add(
        group,
        "--arrivals",
        type=positive,
        default=1.0,
        metavar="PER_SECOND",
        help="open loop: requests a second of each user (so users x arrivals in all)",
    )
    _add(
        group,
        "--spacing",
        choices=["even", "random"],
        default="even",
        help="open loop: evenly spaced arrivals, or random ones (Poisson)",
    )
    _add(
        group,
        "--steps",
        type=steps_text,
        default="",
        metavar="1,2,4,8,16",
        help="numbers of users, one step after the other (instead of a number of users)",
    )
    _add(
        group,
        "--step-seconds",
        type=positive,
        default=20.0,
        metavar="SECONDS",
        help="length of a step",
    )


def _add_thresholds(group: Any) -> None:
    _add(
        group,
        "--max-latency-ms",
        type=limit_text,
        default="",
        metavar="MS",
        help="p95 of the latency, in milliseconds",
    )
    _add(
        group,
        "--max-failure-share",
        type=limit_text,
        default="",
        metavar="SHARE",
        help="failed requests as a share of all, 0 to 1",
    )
    _add(
        group,
        "--max-refused-share",
        type=limit_text,
        default="",
        metavar="SHARE",
        help="refused requests (429) as a share of all, 0 to 1",
    )
    _add(
        group,
        "--max-real-time-factor",
        type=limit_text,
        default="",
        metavar="FACTOR",
        help="p95 of the seconds until a speech request is answered per second of audio",
    )


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise ArgumentTypeError(f"{text!r} must be a number above 0")
    return value


def count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return value


def steps(text: str) -> list[int]:
    """Numbers of users. Raises ArgumentTypeError."""
    try:
        numbers = [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise ArgumentTypeError(f"{text!r} must be a list of numbers of users, such as 1,2,4,8,16")
    return numbers


def steps_text(text: str) -> str:
    steps(text)
    return text


def some_steps_text(text: str) -> str:
    """Where there have to be some."""
    if not steps(text):
        raise ArgumentTypeError("must not be empty; list numbers of users, such as 1,2,4,8,16")
    return text


def limit(text: str | float | None) -> float | None:
    """A threshold, None where it is not set. Raises ArgumentTypeError."""
    if text is None or text == "":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value >= 0 and math.isfinite(value)):
        raise ArgumentTypeError(f"{text!r} must be a number of 0 or more")
    return value


def limit_text(text: str) -> str:
    """Kept as text: Locust's page gives back the type of the default, and "" is "not set"."""
    limit(text)
    return text


def json_text(text: str) -> str:
    try:
        json.loads(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    return text


def check(options: Any) -> None:
    """What Locust's page lets through unchecked. Raises ArgumentTypeError."""
    positive(str(options.timeout))
    positive(str(options.arrivals))
    positive(str(options.step_seconds))
    json_text(options.predict_body)
    steps(options.steps)
    for threshold in ("latency_ms", "failure_share", "refused_share", "real_time_factor"):
        limit(getattr(options, f"max_{threshold}"))
