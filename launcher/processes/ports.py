"""Ports for slots and the controller: a block that no other farm of this machine holds.

An empty slot's port stands in nginx's list all the same. Whoever listened there would be given
requests, so blocks are disjoint between farms, below the range that the kernel hands out, and
nobody listens on them when they are chosen.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from launcher.configuration.config import default_state_dir
from launcher.configuration.state import StateError

LOWEST = 20000
HIGHEST = 32767
"""Linux hands out ports from 32768 on, unless told otherwise."""
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def choose(
    state: Path, size: int, recorded: tuple[int, ...] = (), *, public: int
) -> tuple[int, ...]:
    """A block of ``size`` ports for the farm in ``state``: the recorded one where it is still
    free, else another. Written into the registry of this user's farms.

    ``public``: where the farm's nginx is to listen. Raises StateError when there is none.
    """
    with _registry() as blocks:
        others = {port for name, ports in blocks.items() if name != str(state) for port in ports}
        others.add(public)
        candidates = [recorded[:size]] if len(recorded) >= size else []
        highest = _highest()
        count = (highest - LOWEST) // size
        begin = int(hashlib.sha256(f"{os.getuid()}:{state}".encode()).hexdigest(), 16)
        for step in range(count):
            first = LOWEST + (begin + step) % count * size
            candidates.append(tuple(range(first, first + size)))
        for ports in candidates:
            if others.isdisjoint(ports) and all(is_free(port) for port in ports):
                blocks[str(state)] = list(ports)
                return ports
    raise StateError(f"no {size} free ports in a row between {LOWEST} and {highest}")


def release(state: Path) -> None:
    """Give the block back; the farm has gone."""
    with _registry() as blocks:
        blocks.pop(str(state), None)


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _highest() -> int:
    """The last port below those that the kernel gives to outgoing connections."""
    with suppress(OSError, ValueError):
        lowest_given = int(EPHEMERAL.read_text().split()[0])
        if lowest_given > LOWEST + 1000:
            return min(HIGHEST, lowest_given - 1)
    return HIGHEST


def registry_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Beside the default state directory, or, for users without a home, in /tmp."""
    folder = default_state_dir(environ).parent
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        return folder / "gpufarm-ports.json"
    return Path("/tmp") / f"gpufarm-{os.getuid()}-ports.json"  # noqa: S108 - holds no secret


@contextmanager
def _registry() -> Iterator[dict[str, list[int]]]:
    """The blocks by state directory, locked; what is left in the dict is written back.

    Farms whose directory has gone hold nothing any more.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(registry_file(), flags, 0o600), "r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            read = json.loads(file.read() or "{}")
        except ValueError:
            read = {}
        blocks = {name: ports for name, ports in read.items() if Path(name).is_dir()}
        yield blocks
        file.seek(0)
        file.truncate()
        json.dump(blocks, file)
