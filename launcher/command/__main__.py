"""``gpufarm``, or ``python -m launcher.command``: every expected error is one line and a code."""

# What an error needs is imported when there is one: help answers at once.
# ruff: noqa: PLC0415

from __future__ import annotations

import errno
import os
import signal
import sys
from contextlib import suppress
from types import FrameType

from launcher.command.cli import app
from launcher.command.codes import (
    BAD_CONFIGURATION,
    DOES_NOT_FIT,
    DONE,
    FAILED,
    INTERRUPTED,
    NOT_RUNNING,
)


def _exit_code(error: Exception) -> int | None:
    """The code of an error that a user can act on; None for one that is a mistake of ours."""
    from balancer.nginx import BalancerError
    from launcher.command.bringing_up import UpError
    from launcher.command.client import AwayError, NotRunningError, RefusedError
    from launcher.configuration.config import ConfigError
    from launcher.configuration.state import StateError
    from launcher.planning.footprint import MeasureError
    from launcher.planning.plan import DoesNotFit
    from launcher.processes.orphans import StillRunningError
    from launcher.processes.supervisor import SupervisorError

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
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(DONE)
    except Exception as error:
        code = _exit_code(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" ({error.filename})" if error.filename else ""
            print(
                f"gpufarm: the disk is full{where}; free some space and run the command again",
                file=sys.stderr,
            )
            sys.exit(FAILED)
        if code is None:
            _explain_mistake(error)
            sys.exit(FAILED)
        print(f"gpufarm: {error}", file=sys.stderr)
        sys.exit(code)


def _leave(number: int, frame: FrameType | None) -> None:
    """What was begun is ended on the way out, such as a worker that is being measured."""
    del frame
    raise SystemExit(128 + number)


def _explain_mistake(error: Exception) -> None:
    """An error that nobody expected: one line for the user, a file for whoever mends it."""
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
    print(f"gpufarm: {type(error).__name__}: {told} (unexpected; {details})", file=sys.stderr)


if __name__ == "__main__":
    main()
