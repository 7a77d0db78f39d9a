"""``python -m launcher.supervision.die_with_parent PID COMMAND …``: run a command that the kernel
kills when its parent, the process PID, ends.

Only on Linux; elsewhere the command runs without it. A program of its own rather than a preexec_fn,
which may deadlock in a process with threads. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress

from launcher.config.exit_codes import CANNOT_LOAD

PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>; it lasts through exec."""


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before prctl was called
        sys.exit(1)
    try:
        os.execvp(command[0], command)  # noqa: S606 - replaces this process
    except OSError as error:
        print(f"cannot run {command[0]}: {error.strerror} (model.command)", file=sys.stderr)
        sys.exit(CANNOT_LOAD)


if __name__ == "__main__":
    main()
