"""Asking the controller, from the command line."""

from __future__ import annotations

import http.client
import json
import time
from typing import Any

from launcher.config.state import StateDir
from launcher.supervision import farm as farms
from launcher.supervision import leftovers
from launcher.supervision.farm import Farm
from launcher.supervision.supervisord import Supervisor
from launcher.supervision.unix_http import UnixConnection

TIMEOUT = 30.0
BACK_SECONDS = 5.0


class NotRunningError(Exception):
    """There is no farm in this state directory. Exit code 4."""


class RefusedError(Exception):
    """The controller says no, with the numbers. Exit code 3 where it does not fit, else 1."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class AwayError(Exception):
    """The farm runs, but its controller does not answer just now."""


class Client:
    """The controller's HTTP interface."""

    def __init__(self, farm: Farm) -> None:
        self._path = farm.admin_socket

    def workers(self) -> dict[str, Any]:
        return self._ask("GET", "/workers")

    def plan(self) -> dict[str, Any]:
        return self._ask("GET", "/plan")

    def scale(self, count: int | str) -> dict[str, Any]:
        """``count``: a number, or "auto" for what the configuration says."""
        return self._ask("PUT", "/workers", {"count": count})

    def drain(self, id_: str) -> dict[str, Any]:
        return self._ask("POST", f"/workers/{id_}/drain")

    def restart(self, id_: str | None) -> dict[str, Any]:
        return self._ask("POST", f"/workers/{id_}/restart" if id_ else "/restart")

    def roll_out(self, generation: int, base: int, follow: bool) -> dict[str, Any]:
        """Take up a generation made for the current one ``base``; ``follow``: its count supersedes
        an earlier `scale`."""
        body = {"generation": generation, "base": base, "follow": follow}
        return self._ask("POST", "/rollout", body)

    def _ask(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        connection = UnixConnection(self._path, TIMEOUT)
        try:
            text = None if body is None else json.dumps(body)
            self._connect(connection)
            connection.request(method, path, text, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            data = json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise AwayError(f"the controller does not answer: {error}") from None
        finally:
            connection.close()
        if answer.status >= 300:
            raise RefusedError(data["error"]["message"], answer.status)
        return dict(data)

    @staticmethod
    def _connect(connection: UnixConnection) -> None:
        """A controller that died is back within a second or two; nothing was sent yet."""
        deadline = time.monotonic() + BACK_SECONDS
        while True:
            try:
                connection.connect()
                return
            except (ConnectionRefusedError, FileNotFoundError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


def serves(farm: Farm) -> bool:
    """Whether a worker is ready. True as well where the controller is away and cannot say."""
    try:
        workers = Client(farm).workers()["workers"]
    except AwayError:
        return True
    return any(worker["state"] == "ready" for worker in workers)


def running_farm(state: StateDir) -> Farm:
    """The farm that runs in a state directory. Raises NotRunningError."""
    farm = farms.load(state) if state.path.is_dir() else None
    if farm is None and leftovers.find_supervisors(state.path):
        raise AwayError(
            f"the records of the farm in {state.path} are lost or unreadable; end what runs with "
            f"`gpufarm down`, then start it with `gpufarm up`"
        )
    if farm is None:
        raise NotRunningError(f"no farm is running in {state.path}; start one with `gpufarm up`")
    if not answers(farm):
        raise NotRunningError(
            f"the farm in {state.path} has no supervisor: it is just starting or stopping, or it "
            f"was killed; `gpufarm up` brings it back, `gpufarm down` ends what is left"
        )
    return farm


def answers(farm: Farm) -> bool:
    """Whether the farm's supervisor answers; one that lost its socket makes another in a moment."""
    control = Supervisor(farm.socket)
    deadline = time.monotonic() + BACK_SECONDS
    while not control.alive():
        if time.monotonic() > deadline or not leftovers.find_supervisors(farm.state.path):
            return False
        time.sleep(0.1)
    return True
