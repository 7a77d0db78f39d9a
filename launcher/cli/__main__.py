"""``gpufarm``, or ``python -m launcher.cli``: every expected error is one line and a code."""

# What an error needs is imported when there is one: help answers at once.
# ruff: noqa: PLC0415

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn, Protocol, TypeGuard

from typer import Abort

from launcher.cli.app import app
from launcher.config.exit_codes import (
    BAD_CONFIGURATION,
    DOES_NOT_FIT,
    DONE,
    FAILED,
    INTERRUPTED,
    NOT_RUNNING,
)


class UsageError(Protocol):
    """What Typer raises for a wrong command line."""

    exit_code: int

    def format_message(self) -> str: ...
    def show(self) -> None: ...


def _exit_code(error: Exception) -> int | None:
    """The code of an error that a user can act on; None for one that is a mistake of ours."""
    from balancer.nginx import BalancerError
    from launcher.cli.client import AwayError, NotRunningError, RefusedError
    from launcher.cli.up import UpError
    from launcher.config.settings import ConfigError
    from launcher.config.state import StateError
    from launcher.planning.footprint import MeasureError
    from launcher.planning.plan import DoesNotFit
    from launcher.supervision.leftovers import StillRunningError
    from launcher.supervision.supervisord import SupervisorError

    if isinstance(error, RefusedError):
        if error.status >= 500:
            return FAILED
        return DOES_NOT_FIT if error.status == 409 else BAD_CONFIGURATION
    codes: tuple[tuple[type[Exception], int], ...] = (
        (ConfigError, BAD_CONFIGURATION),
        (DoesNotFit, DOES_NOT_FIT),
        (NotRunningError, NOT_RUNNING),
        (UpError, FAILED),
        (AwayError, FAILED),
        (BalancerError, FAILED),
        (MeasureError, FAILED),
        (StateError, FAILED),
        (SupervisorError, FAILED),
        (StillRunningError, FAILED),
    )
    return next((code for kind, code in codes if isinstance(error, kind)), None)


def main() -> None:
    """Run the command; every expected error is one line and an exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _leave)
    try:
        sys.exit(app(standalone_mode=False) or DONE)
    except (KeyboardInterrupt, Abort):
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(DONE)
    except Exception as error:
        if is_usage_error(error):
            error.show()
            _print_json(error.format_message(), error.exit_code, error)
            sys.exit(error.exit_code)
        code = _exit_code(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" ({error.filename})" if error.filename else ""
            _fail(f"the disk is full{where}; free some space and run the command again", FAILED)
        if code is None:
            _fail(_explain_mistake(error), FAILED, error)
        _fail(str(error), code, error)


def is_usage_error(error: Exception) -> TypeGuard[UsageError]:
    """Whether the command line itself is wrong: an unknown option, a missing argument.

    Typer brings click's exceptions from a module that changes with its version.
    """
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _fail(message: str, code: int, error: Exception | None = None) -> NoReturn:
    """One line on standard error, the same as JSON on standard output where it was asked for."""
    print(f"gpufarm: {message}", file=sys.stderr)
    _print_json(message, code, error)
    sys.exit(code)


def _print_json(message: str, code: int, error: object) -> None:
    """The error on standard output, where ``--json`` is among the arguments."""
    arguments = sys.argv[1:]
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "--json" in options:
        kind = "OSError" if error is None else type(error).__name__
        body = {"error": {"message": message, "code": code, "type": kind}}
        print(json.dumps(body, indent=2, ensure_ascii=False))


def _leave(number: int, frame: FrameType | None) -> None:
    """What was begun is ended on the way out, such as a worker that is being measured."""
    del frame
    raise SystemExit(128 + number)


def _explain_mistake(error: Exception) -> str:
    """The line about an unexpected error; its traceback goes into a file."""
    import tempfile
    import traceback

    details = "no details: the folder for temporary files cannot be written"
    with suppress(OSError):
        with tempfile.NamedTemporaryFile(
            "w", prefix="gpufarm-error-", suffix=".txt", delete=False
        ) as file:
            traceback.print_exception(error, file=file)
        details = f"details in {file.name}"
    told = " ".join(str(error).split())
    return f"{type(error).__name__}: {told} (unexpected; {details})"


if __name__ == "__main__":
    main()
