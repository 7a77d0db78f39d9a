"""``python -m launcher.controller --state DIR``: the controller's process, under supervisord."""

from __future__ import annotations

import argparse
import asyncio
from contextlib import suppress
from pathlib import Path

from launcher.config.state import StateDir
from launcher.controller import logs
from launcher.controller.admin import AdminServer
from launcher.controller.run import Controller
from launcher.supervision import farm as farms
from launcher.supervision.farm import Farm
from launcher.supervision.supervisord import Supervisor


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
    parser = argparse.ArgumentParser(prog="launcher.controller", description=__doc__)
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
