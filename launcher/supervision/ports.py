"""Ports for slots: chosen so that no other farm of this machine has them, and held.

An empty slot's port stands in nginx's list all the same, and a process that listened there would be
given requests. So ports are disjoint between farms, below the range that the kernel hands out, free
when they are chosen, and held from then on by sockets that are bound and never listen.
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

from launcher.config.settings import default_state_dir
from launcher.config.state import StateError

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


def extend(state: Path, recorded: tuple[int, ...], size: int, *, public: int) -> tuple[int, ...]:
    """Keep the ports of a running farm and add others until there are ``size``."""
    missing = size - len(recorded)
    if missing <= 0:
        return recorded
    with _registry() as blocks:
        known = {port for ports in blocks.values() for port in ports} | {public, *recorded}
        begin = recorded[-1] + 1 if recorded else LOWEST
        span = _highest() - LOWEST
        turn = (LOWEST + (begin - LOWEST + step) % span for step in range(span))
        added = []
        for port in turn:
            if port not in known and is_free(port):
                added.append(port)
            if len(added) == missing:
                blocks[str(state)] = [*recorded, *added]
                return (*recorded, *added)
    raise StateError(f"{missing} more free ports are not to be had between {LOWEST} and {HIGHEST}")


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


class HeldPorts:
    """Ports that this process holds: bound with SO_REUSEPORT, and never listening.

    A connection to such a port is refused as if nothing were there. Another user cannot bind it
    with any option; a process of this user can only if it sets SO_REUSEPORT too, as workers do.
    """

    def __init__(self) -> None:
        self._sockets: dict[int, socket.socket] = {}

    def hold(self, port: int) -> bool:
        """Hold the port; False where something else has it."""
        if port in self._sockets:
            return True
        held = socket.socket()
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Connections of a server that has just ended linger on its port. They must not be in the
        # way, but nothing may get past this socket by the same option afterwards.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind(("127.0.0.1", port))
        except OSError:
            held.close()
            return False
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        self._sockets[port] = held
        return True

    def release(self, port: int) -> None:
        """Let go of it, for a server that does not set SO_REUSEPORT itself."""
        held = self._sockets.pop(port, None)
        if held is not None:
            held.close()
