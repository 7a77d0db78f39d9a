"""The HTTP server: listens once the model is warm, drains on a signal, then exits with 0."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import socket
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from workers.http.protocol import JsonErrorProtocol
from workers.http.state import WorkerState
from workers.logs import log

KEEP_ALIVE = 90
"""Seconds an idle connection stays open: longer than nginx keeps it, so that nginx never uses a
connection that is being closed."""

DRAIN_GRACE = 5.0
"""Seconds a drain may take beyond the longest request."""

_PROBE = 1.0
"""Seconds within which a local connect succeeds or is refused."""

_ARRIVAL_GRACE = 0.05
"""Seconds to read a request whose connection was accepted just before the drain."""

_ANSWER_GRACE = 0.25
"""Seconds to send the response of the request that lost the device."""


class PortTaken(Exception):  # noqa: N818 - says what is wrong
    """The address cannot be bound: one line with the address and the remedy."""


def reserve(host: str, port: int) -> socket.socket:
    """Bind the port without listening: no other process can take it, and it refuses connections.

    The controller holds an empty slot's port by a socket that is bound with SO_REUSEPORT and never
    listens, so that no other user can take it. Beside it a process of the same user binds with
    SO_REUSEPORT too. That would succeed beside a server as well, and the kernel would share its
    connections out between both: so a port that accepts connections is rejected first.

    Raises PortTaken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    reserved = socket.socket(family, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        if port and _accepts(family, host, port):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        reserved.bind((host, port))
    except OSError as error:
        reserved.close()
        raise _port_taken(host, port, error) from None
    return reserved


def _accepts(family: int, host: str, port: int) -> bool:
    """Whether a server listens there. One whose backlog is full lets a connect wait, which is not
    a refusal either."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE)
        try:
            probe.connect((host, port))  # 0.0.0.0 and :: reach this machine
        except TimeoutError:
            return True
        except OSError:
            return False
        # within the ephemeral port range the probe may have connected to itself
        return bool(probe.getsockname() != probe.getpeername())


class Server(uvicorn.Server):
    """uvicorn's server, except that it does not raise the signal again after the drain."""

    def __init__(self, app: ASGIApp, worker: WorkerState) -> None:
        timeout = worker.spec.request_timeout + DRAIN_GRACE
        super().__init__(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=JsonErrorProtocol,
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=math.ceil(timeout),
            )
        )
        self._worker = worker
        worker.queue.on_device_lost = self._exit_at_once

    def listen(self, reserved: socket.socket) -> None:
        """Serve until drained. Raises PortTaken when another server listens there by now."""
        host, port = reserved.getsockname()[:2]
        try:
            if _accepts(reserved.family, host, port):  # it started while the model was loading
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            reserved.listen(self.config.backlog)
        except OSError as error:
            raise _port_taken(host, port, error) from None
        self.run(sockets=[reserved])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets is not None
        host, port = sockets[0].getsockname()[:2]
        log.info("ready url=http://%s:%d pid=%d", host, port, os.getpid())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        queue = self._worker.queue
        self._worker.draining = True
        log.info("draining running=%d waiting=%d", queue.running, queue.waiting)
        for server in self.servers:
            server.close()
        await asyncio.sleep(_ARRIVAL_GRACE)
        await super().shutdown(sockets)

    def _exit_at_once(self) -> None:
        """Exit with 1, because the device is lost to this process: another worker can serve the
        requests that wait."""
        log.critical("the device is lost to this process; exiting with 1")
        for server in self.servers:
            server.close()
        asyncio.get_running_loop().call_later(_ANSWER_GRACE, os._exit, 1)


def _port_taken(host: str, port: int, error: OSError) -> PortTaken:
    if error.errno == errno.EADDRINUSE:
        return PortTaken(
            f"port {port} on {host} is in use; stop its server, or choose another --port"
        )
    return PortTaken(f"cannot listen on {host}:{port}: {error.strerror}; correct --host or --port")
