"""The farm as the controller tells it."""

from __future__ import annotations

from typing import Any

from launcher.control.controller import Controller


def view(controller: Controller) -> dict[str, Any]:
    """``GET /workers`` but for what has to be measured: the wanted slots and whatever runs."""
    plan, memory = controller.farm.plan, controller.memory
    workers = []
    for slot in plan.slots:
        record = memory.of(slot.id)
        drained = slot.id in controller.desired.drained
        if not (slot.id in controller.wanted or record.state != "stopped" or drained):
            continue
        workers.append(
            {
                "id": slot.id,
                "pid": record.pid or None,
                "port": slot.port,
                "device": slot.device_id,
                "state": record.state,
                "wanted": slot.id in controller.wanted,
                "drained": drained,
                "restarts": record.restarts,
                "ready_seconds": record.ready_seconds,
                "error": record.error or None,
                "current": record.spec in ("", controller.farm.digest),
            }
        )
    return {
        "url": controller.farm.url,
        "count": controller.desired.count,
        "capacity": plan.capacity,
        "settled": controller.settled,
        "problem": controller.problem or None,
        "restart": {
            "pending": [id_ for id_, _ in memory.roll.pending],
            "error": memory.roll.error or None,
        },
        "workers": workers,
    }
