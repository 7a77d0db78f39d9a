"""XML-RPC methods that this project adds to supervisord (namespace ``farm``).

supervisord lives as long as the farm, so it is what holds the slots' ports.

supervisord can only replace a program by stopping it. Here its definition is replaced in place: a
running process goes on, and its next start, stop or log rotation follows the new file.
"""

from __future__ import annotations

from typing import Any

from supervisor.process import getProcessStateDescription
from supervisor.xmlrpc import Faults, RPCError

from launcher.supervision.ports import HeldPorts

NAMESPACE = "farm"


class FarmInterface:
    """The interface that ``supervisor.rpcinterface_factory`` creates."""

    def __init__(self, supervisord: Any) -> None:
        self._supervisord = supervisord
        self._held = HeldPorts()

    def hold(self, ports: list[int]) -> list[int]:
        """Hold ports for as long as the farm runs; return those that something else has."""
        return [port for port in ports if not self._held.hold(port)]

    def release(self, port: int) -> bool:
        """Let go of a port, for a server that cannot share it; `hold` takes it again."""
        self._held.release(port)
        return True

    def processes(self) -> list[dict[str, Any]]:
        """Return every process: name, state, pid, exit_code and started (Unix seconds)."""
        return [
            {
                "name": process.config.name,
                "state": getProcessStateDescription(process.get_state()),
                "pid": process.pid,
                "exit_code": process.exitstatus or 0,
                "started": float(process.laststart),
            }
            for group in list(self._supervisord.process_groups.values())
            for process in group.processes.values()
        ]

    def update(self) -> bool:
        """Read the file again and replace every program's definition without stopping a process.

        A program that is no longer in the file is kept while it runs. Raises a fault, and changes
        nothing, if the file cannot be read.
        """
        options = self._supervisord.options
        try:
            options.process_config(do_usage=False)
        except ValueError as error:
            raise RPCError(Faults.CANT_REREAD, str(error)) from None
        for config in options.process_group_configs:
            group = self._supervisord.process_groups.get(config.name)
            if group is None:
                self._supervisord.add_process_group(config)
            else:
                _replace_definitions(group, config)
        return True


def _replace_definitions(group: Any, config: Any) -> None:
    config.after_setuid()
    group.config = config
    named = {process.name: process for process in config.process_configs}
    for name, definition in named.items():
        if name in group.processes:
            group.processes[name].config = definition
        else:
            group.processes[name] = definition.make_process(group)
    for name in [name for name in group.processes if name not in named]:
        if not group.processes[name].pid:
            del group.processes[name]


def make_interface(supervisord: Any, **config: Any) -> FarmInterface:
    """Called by supervisord for ``[rpcinterface:farm]``."""
    del config
    return FarmInterface(supervisord)
