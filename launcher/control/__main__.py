"""``python -m launcher.control --state DIR``: the controller's process, under supervisord."""

from __future__ import annotations

import argparse
import asyncio
from contextlib import suppress
from pathlib import Path

from launcher.configuration.state import StateDir
from launcher.control import logs
from launcher.control.admin import AdminServer
from launcher.control.controller import Controller
from launcher.processes import farm as farms
from launcher.processes.farm import Farm
from launcher.processes.supervisor import Supervisor


async def serve(farm: Farm) -> None:
    """Run the controller and its admin interface until SIGTERM."""
    controller = Controller(farm, Supervisor(farm.socket))
    loop = asyncio.create_task(controller.run())
    try:
        await AdminServer(controller).serve_on_socket()
    finally:
        loop.cancel()
        with suppress(asyncio.CancelledError):
            await loop


def main() -> None:
    parser = argparse.ArgumentParser(prog="launcher.control", description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    options = parser.parse_args()
    logs.set_up()
    farm = farms.load(StateDir(options.state))
    if farm is None:
        parser.exit(1, f"no farm is recorded in {options.state}; run `gpufarm up`\n")
    logs.set_up(farm.settings.logs.format)
    asyncio.run(serve(farm))


if __name__ == "__main__":
    main()
