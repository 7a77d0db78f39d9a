"""``python -m balancer.start``: exec nginx, after releasing the port from an earlier one.

supervisord runs it in a process group of its own. The processes of a killed master still hold the
port: they are signalled to finish their requests and to stop listening first.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import time
from pathlib import Path

from balancer import nginx, processes
from balancer.configuration import CLOSING, listening

RELEASE_CHECK_SECONDS = 0.002
"""Seconds between two checks of the port."""
RELEASE_SECONDS = 1.0
"""Seconds that an old process may take to release the port before it is killed."""


def why_not_free(host: str, port: int) -> OSError | None:
    """Return why nginx cannot listen there now; None if it can.

    A `socket.gaierror` means that the host cannot be resolved.
    """
    try:
        found = socket.getaddrinfo(
            None if host == "*" else host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        return error
    for family, kind, protocol, _, where in found:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(where)
            except OSError as error:
                return error
    return None


def port_is_free(host: str, port: int) -> bool:
    """Return whether nginx can listen there now.

    A host that cannot be resolved counts as free: nginx itself reports that error.
    """
    problem = why_not_free(host, port)
    return problem is None or isinstance(problem, socket.gaierror)


def release_port(prefix: Path, host: str, port: int) -> None:
    """Stop leftover nginx processes of this prefix from listening; their requests may finish."""
    old = processes.all_members(prefix)
    if not old:
        return
    processes.send(old, signal.SIGQUIT)
    deadline = time.monotonic() + RELEASE_SECONDS
    while not port_is_free(host, port):
        if time.monotonic() > deadline:
            processes.send(processes.all_members(prefix), signal.SIGKILL)
            return
        time.sleep(RELEASE_CHECK_SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="balancer.start", description=__doc__)
    parser.add_argument("--program", type=Path, required=True)
    parser.add_argument("--prefix", type=Path, required=True)
    options = parser.parse_args()

    options.program, options.prefix = options.program.absolute(), options.prefix.absolute()
    os.chdir(options.prefix)  # nginx finds CLOSING relative to its current folder
    (options.prefix / CLOSING).unlink(missing_ok=True)
    arguments = nginx.command(options.program, nginx.version(options.program), options.prefix)
    old = [
        master
        for master in processes.read(options.prefix)
        if processes.members(master, options.prefix)
    ]
    processes.write(options.prefix, [*old, processes.this_process()])
    # Last: clients are refused from here until nginx listens.
    release_port(options.prefix, *listening(options.prefix))
    os.execv(arguments[0], arguments)  # noqa: S606 - replaces this process


if __name__ == "__main__":
    main()
