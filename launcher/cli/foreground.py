"""`gpufarm up --foreground`: the farm for as long as this process lives, as containers want it."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

from launcher.cli.client import AwayError, serves
from launcher.cli.down import remove_traces, shut_down
from launcher.cli.log_tail import Follower
from launcher.cli.up import Up, UpError
from launcher.supervision.farm import Farm

CHECK_SECONDS = 0.2


class _Told(BaseException):
    """SIGTERM or SIGINT came while the farm was being started."""


def stay(run: Up) -> int:
    """Start the farm and print every process's log until SIGTERM or SIGINT, then drain.

    Returns supervisord's exit code: 0 after a drain. A farm in which nothing can be loaded ends
    with 1: who runs the container has to know. Raises what starting raises.
    """
    _on_signal(_raise)
    try:
        with run.state.lock():
            farm = run.bring_up()
    except _Told:
        if run.farm is not None and run.child is not None:
            shut_down(run.farm)
            remove_traces(run.state)
        return 0
    if run.child is None:
        raise UpError("the farm already runs; end it with `gpufarm down` first")
    return _Stay(run, farm).until_told()


class _Stay:
    """The time between ready and the end."""

    def __init__(self, run: Up, farm: Farm) -> None:
        self._run = run
        self._farm = farm
        self._stop = threading.Event()
        self._hopeless = False
        as_json = farm.settings.logs.format == "json"
        self._follower = Follower(farm.state.logs, (), _print, lines=0, as_json=as_json)

    def until_told(self) -> int:
        child = self._run.child
        assert child is not None
        _on_signal(self._told)
        threading.Thread(target=self._announce, daemon=True).start()
        self._follower.follow(lambda: self._stop.is_set() or child.poll() is not None)
        asked = self._stop.is_set()
        ending = threading.Thread(target=shut_down, args=(self._farm,))
        ending.start()
        # Draining may take long, and what happens meanwhile is worth seeing.
        while ending.is_alive():
            child.poll()
            self._follower.show_new()
            ending.join(CHECK_SECONDS)
        self._follower.show_new()
        code = child.wait()
        remove_traces(self._farm.state)
        if self._hopeless:
            return 1
        return 0 if asked and code == 0 else code if code > 0 else int(code < 0)

    def _told(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._stop.set()

    def _announce(self) -> None:
        """Say when the farm is ready; end it when it never will be."""
        try:
            view = self._run.wait(self._farm)
            ready = sum(worker["state"] == "ready" for worker in view["workers"])
            told = "1 worker is" if ready == 1 else f"{ready} workers are"
            _print(f"gpufarm | {told} ready at {self._farm.url}")
        except (UpError, AwayError) as error:
            if self._stop.is_set():
                return
            _print(f"gpufarm | {error}")
            if not serves(self._farm):
                self._hopeless = True
                self._stop.set()


def _on_signal(handler: object) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)  # type: ignore[arg-type]


def _raise(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise _Told


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
