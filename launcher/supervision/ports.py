"""Choose the ports of slots, unique among the farms of this machine, and reserve them.

nginx lists an empty slot's port too, and would send requests to any process that listens there. So
ports are disjoint between farms, below the kernel's ephemeral range, free when they are chosen, and
then reserved by sockets that are bound and never listen.
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
"""Linux's ephemeral ports begin at 32768 by default."""
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def choose(
    state: Path, size: int, recorded: tuple[int, ...] = (), *, public: int
) -> tuple[int, ...]:
    """Choose a block of ``size`` ports for the farm in ``state``, and register it.

    The ``recorded`` block is kept if it is still free. ``public``: the port that the farm's nginx
    listens on. Raises StateError when there is no free block.
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
    raise StateError(f"no {size} consecutive free ports between {LOWEST} and {highest}")


def extend(state: Path, recorded: tuple[int, ...], size: int, *, public: int) -> tuple[int, ...]:
    """Keep the ports of a running farm and add free ones until there are ``size``.

    Raises StateError when there are not enough.
    """
    missing = size - len(recorded)
    if missing <= 0:
        return recorded
    with _registry() as blocks:
        known = {port for ports in blocks.values() for port in ports} | {public, *recorded}
        begin = recorded[-1] + 1 if recorded else LOWEST
        span = _highest() - LOWEST
        candidates = (LOWEST + (begin - LOWEST + step) % span for step in range(span))
        added = []
        for port in candidates:
            if port not in known and is_free(port):
                added.append(port)
            if len(added) == missing:
                blocks[str(state)] = [*recorded, *added]
                return (*recorded, *added)
    raise StateError(f"no {missing} more free ports between {LOWEST} and {HIGHEST}")


def release(state: Path) -> None:
    """Remove the farm's block from the registry."""
    with _registry() as blocks:
        blocks.pop(str(state), None)


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Return whether a server could listen on the port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _highest() -> int:
    """Return the last port below the kernel's ephemeral range."""
    with suppress(OSError, ValueError):
        lowest_ephemeral = int(EPHEMERAL.read_text().split()[0])
        if lowest_ephemeral > LOWEST + 1000:
            return min(HIGHEST, lowest_ephemeral - 1)
    return HIGHEST


def registry_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Return its path: beside the default state directory, or in /tmp for users without a home."""
    folder = default_state_dir(environ).parent
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        return folder / "gpufarm-ports.json"
    return Path("/tmp") / f"gpufarm-{os.getuid()}-ports.json"  # noqa: S108 - holds no secret


@contextmanager
def _registry() -> Iterator[dict[str, list[int]]]:
    """Lock the registry and yield its blocks by state directory; write the dict back at the end.

    Farms whose directory no longer exists are dropped.
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
    """Ports that this process reserves: bound with SO_REUSEPORT, and never listening.

    Connections to them are refused as on an unused port. Other users cannot bind them at all;
    processes of this user only with SO_REUSEPORT, which workers set.
    """

    def __init__(self) -> None:
        self._sockets: dict[int, socket.socket] = {}

    def hold(self, port: int) -> bool:
        """Reserve the port; False if another process has it."""
        if port in self._sockets:
            return True
        held = socket.socket()
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # SO_REUSEADDR binds despite lingering connections of a server that has just ended. It is
        # unset afterwards, so that no other socket can bind by the same option.
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
        """Release the port, for a server that does not set SO_REUSEPORT."""
        held = self._sockets.pop(port, None)
        if held is not None:
            held.close()
