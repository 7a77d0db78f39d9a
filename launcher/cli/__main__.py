"""``gpufarm``, or ``python -m launcher.cli``: run a command; report each error as one line."""

# Errors are imported only when one is raised, so that help is instant.
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

from launcher.config.exit_codes import (
    BAD_CONFIGURATION,
    DOES_NOT_FIT,
    DONE,
    FAILED,
    INTERRUPTED,
    NOT_RUNNING,
)


class UsageError(Protocol):
    """The error that Typer raises for a wrong command line."""

    exit_code: int

    def format_message(self) -> str: ...
    def show(self) -> None: ...


def _exit_code(error: Exception) -> int | None:
    """Return the exit code of an expected error; None for a bug of gpufarm."""
    from balancer.nginx import BalancerError
    from launcher.cli.client import ControllerUnavailableError, NotRunningError, RefusedError
    from launcher.cli.up import UpError
    from launcher.config.settings import ConfigError
    from launcher.config.state import StateError
    from launcher.planning.footprint import MeasureError
    from launcher.planning.plan import DoesNotFit
    from launcher.supervision.leftovers import StillRunningError
    from launcher.supervision.supervisord import SupervisorError

    if isinstance(error, RefusedError):
        if error.status >= 500 or error.status == 412:
            return FAILED
        return DOES_NOT_FIT if error.status == 409 else BAD_CONFIGURATION
    codes: tuple[tuple[type[Exception], int], ...] = (
        (ConfigError, BAD_CONFIGURATION),
        (DoesNotFit, DOES_NOT_FIT),
        (NotRunningError, NOT_RUNNING),
        (UpError, FAILED),
        (ControllerUnavailableError, FAILED),
        (BalancerError, FAILED),
        (MeasureError, FAILED),
        (StateError, FAILED),
        (SupervisorError, FAILED),
        (StillRunningError, FAILED),
    )
    return next((code for kind, code in codes if isinstance(error, kind)), None)


def main() -> None:
    """Run the command; an expected error is one line and an exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _exit_on_signal)
    try:
        from launcher.cli.app import app

        sys.exit(app(standalone_mode=False) or DONE)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(DONE)
    except Exception as error:
        if type(error).__name__ == "Abort":  # Typer's own, for an interrupt at a prompt
            sys.exit(INTERRUPTED)
        if is_usage_error(error):
            error.show()
            _print_json(error.format_message(), error.exit_code, error)
            sys.exit(error.exit_code)
        code = _exit_code(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" ({error.filename})" if error.filename else ""
            _fail(f"the disk is full{where}; free some space and run the command again", FAILED)
        if code is None:
            _fail(_describe_bug(error), FAILED, error)
        _fail(str(error), code, error)


def is_usage_error(error: Exception) -> TypeGuard[UsageError]:
    """Return whether the command line is wrong: an unknown option, a missing argument.

    Typer re-exports click's exceptions from a module that changes with its version.
    """
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _fail(message: str, code: int, error: Exception | None = None) -> NoReturn:
    """Print the error on standard error, and as JSON where ``--json`` asks for it; exit."""
    print(f"gpufarm: {message}", file=sys.stderr)
    _print_json(message, code, error)
    sys.exit(code)


def _print_json(message: str, code: int, error: object) -> None:
    """Print the error as JSON on standard output where ``--json`` is given."""
    arguments = sys.argv[1:]
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "--json" in options:
        kind = "OSError" if error is None else type(error).__name__
        body = {"error": {"message": message, "code": code, "type": kind}}
        print(json.dumps(body, indent=2, ensure_ascii=False))


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    """Raise, so that cleanup runs, such as that of a worker that is being measured."""
    del frame
    raise SystemExit(128 + number)


def _describe_bug(error: Exception) -> str:
    """Format an unexpected error as one line, and write its traceback to a file."""
    import tempfile
    import traceback

    details = "no details: the temporary directory is not writable"
    with suppress(OSError):
        with tempfile.NamedTemporaryFile(
            "w", prefix="gpufarm-error-", suffix=".txt", delete=False
        ) as file:
            traceback.print_exception(error, file=file)
        details = f"details in {file.name}"
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message} (unexpected; {details})"


if __name__ == "__main__":
    main()
