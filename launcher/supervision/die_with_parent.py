"""``python -m launcher.supervision.die_with_parent PID COMMAND …``: become a command that ends with
its parent, the process PID, even where that is killed.

Linux sends the signal; elsewhere the command simply runs. Set between fork and exec of a program
of its own, for code that runs there in the parent's copy may deadlock. Standard library only.
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
    if os.getppid() != parent:  # it ended before the signal was asked for
        sys.exit(1)
    try:
        os.execvp(command[0], command)  # noqa: S606 - to become it is the point
    except OSError as error:
        print(f"cannot run {command[0]}: {error.strerror} (model.command)", file=sys.stderr)
        sys.exit(CANNOT_LOAD)


if __name__ == "__main__":
    main()
