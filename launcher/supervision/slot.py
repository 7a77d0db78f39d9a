"""``python -m launcher.supervision.slot --state DIR --slot K``: exec the worker of slot wK.

supervisord runs this instead of the worker itself, because the slot's port, device and command can
change with a new plan while supervisord's configuration stays the same. Standard library only, so
that a restart after a crash is fast.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from launcher.config.exit_codes import CANNOT_LOAD


def main() -> None:
    arguments = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    state, id_ = Path(arguments["--state"]), f"w{arguments['--slot']}"
    file = state / "slots" / f"{id_}.json"
    try:
        launch = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(fail(f"{id_}: {file} cannot be read ({error!r}); run `gpufarm up`"))
    environment = {**os.environ, **launch["environment"]}
    program = launch["argv"][0]
    try:
        os.chdir(launch["folder"])
        os.execvpe(program, launch["argv"], environment)  # noqa: S606 - replaces this process
    except OSError as error:
        sys.exit(fail(f"{id_}: cannot run {program}: {error.strerror} (model.command)"))
    except ValueError as error:  # a NUL, or a variable's name with "="
        where = "model.command and model.environment"
        sys.exit(fail(f"{id_}: cannot run {program}: {error}; correct {where}"))


def fail(message: str) -> int:
    print(message, file=sys.stderr, flush=True)
    return CANNOT_LOAD


if __name__ == "__main__":
    main()
