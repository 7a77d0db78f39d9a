"""The controller's client, and whether a farm runs at all."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from typing import Any

from launcher.config.state import StateDir
from launcher.supervision import farm as farms
from launcher.supervision import leftovers
from launcher.supervision.farm import Farm
from launcher.supervision.supervisord import Supervisor
from launcher.supervision.unix_http import UnixConnection

REQUEST_SECONDS = 30.0
RECONNECT_SECONDS = 5.0
"""A controller or supervisord that lost its socket has a new one within a second or two."""
POLL_SECONDS = 0.1


class NotRunningError(Exception):
    """No farm runs in this state directory. Exit code 4."""


class RefusedError(Exception):
    """The controller refused a request; ``status`` is its HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ControllerUnavailableError(Exception):
    """The farm runs, but its controller does not answer at the moment. Exit code 1."""


def poll_until(condition: Callable[[], bool], seconds: float, interval: float) -> bool:
    """Wait until ``condition`` holds, for ``seconds`` at most. Returns whether it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval)
    return True


class Client:
    """Speaks the controller's HTTP interface."""

    def __init__(self, farm: Farm) -> None:
        self._path = farm.admin_socket

    def workers(self) -> dict[str, Any]:
        return self._request("GET", "/workers")

    def plan(self) -> dict[str, Any]:
        return self._request("GET", "/plan")

    def scale(self, count: int | str) -> dict[str, Any]:
        """Set the desired count: a number, or "auto" for the configured one."""
        return self._request("PUT", "/workers", {"count": count})

    def drain(self, id_: str) -> dict[str, Any]:
        return self._request("POST", f"/workers/{id_}/drain")

    def restart(self, id_: str | None) -> dict[str, Any]:
        return self._request("POST", f"/workers/{id_}/restart" if id_ else "/restart")

    def roll_out(self, generation: int, base: int, follow: bool) -> dict[str, Any]:
        """Roll out a generation that was made for the current one, ``base``.

        ``follow``: its count supersedes an earlier `scale`.
        """
        body = {"generation": generation, "base": base, "follow": follow}
        return self._request("POST", "/rollout", body)

    def _request(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        connection = UnixConnection(self._path, REQUEST_SECONDS)
        try:
            text = None if body is None else json.dumps(body)
            self._connect(connection)
            connection.request(method, path, text, {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ControllerUnavailableError(f"the controller does not answer: {error}") from None
        finally:
            connection.close()
        if response.status >= 300:
            raise RefusedError(data["error"]["message"], response.status)
        return dict(data)

    @staticmethod
    def _connect(connection: UnixConnection) -> None:
        """Connect, waiting for a controller that restarts: nothing has been sent yet."""
        deadline = time.monotonic() + RECONNECT_SECONDS
        while True:
            try:
                connection.connect()
                return
            except (ConnectionRefusedError, FileNotFoundError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_SECONDS)


def retry_while_unavailable(
    request: Callable[[], dict[str, Any]], seconds: float
) -> dict[str, Any]:
    """Send a request to a controller that may be restarting, until it answers.

    Raises ControllerUnavailableError after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return request()
        except ControllerUnavailableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)


def may_serve(farm: Farm) -> bool:
    """Return whether a worker is ready, or the controller cannot be asked."""
    try:
        workers = Client(farm).workers()["workers"]
    except ControllerUnavailableError:
        return True
    return any(worker["state"] == "ready" for worker in workers)


def running_farm(state: StateDir) -> Farm:
    """Load the farm that runs in a state directory.

    Raises NotRunningError, and ControllerUnavailableError where its records are lost.
    """
    farm = farms.load(state) if state.path.is_dir() else None
    if farm is None and leftovers.find_supervisors(state.path):
        raise ControllerUnavailableError(
            f"the records of the farm in {state.path} are lost or unreadable; end it with "
            f"`gpufarm down`, then start it with `gpufarm up`"
        )
    if farm is None:
        raise NotRunningError(f"no farm is running in {state.path}; start one with `gpufarm up`")
    if not supervisor_answers(farm):
        raise NotRunningError(
            f"the farm in {state.path} has no supervisor: it is starting or stopping, or it was "
            f"killed; `gpufarm up` restarts it, `gpufarm down` ends what is left"
        )
    return farm


def supervisor_answers(farm: Farm) -> bool:
    """Return whether the farm's supervisord answers, waiting for one that lost its socket."""
    control = Supervisor(farm.socket)

    def answers_or_ended() -> bool:
        return control.alive() or not leftovers.find_supervisors(farm.state.path)

    return poll_until(answers_or_ended, RECONNECT_SECONDS, POLL_SECONDS) and control.alive()
