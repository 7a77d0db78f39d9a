"""The farm's state as ``GET /workers`` reports it."""

from __future__ import annotations

from typing import Any

from launcher.controller.model import Record
from launcher.controller.run import Controller


def view(controller: Controller) -> dict[str, Any]:
    """Return the desired slots and all that run, without what has to be measured."""
    farm, memory, goal = controller.farm, controller.memory, controller.current
    plan, desired = farm.plan, controller.desired
    desired_slots, drained = set(goal.desired_slots), goal.drained
    listed = [
        id_
        for id_ in (*goal.by_id, *(id_ for id_ in memory.records if id_ not in goal.by_id))
        if id_ in desired_slots or id_ in drained or memory.of(id_).state != "stopped"
    ]
    restart = memory.rollout
    return {
        "url": farm.url,
        "count": len(goal.desired_slots),
        "count_from": "configuration" if desired.count is None else "scale",
        "configured": plan.count,
        "capacity": plan.capacity,
        "settled": controller.settled,
        "problem": controller.problem or None,
        "generation": {
            "current": farm.current.number,
            "candidate": farm.candidate.number if farm.candidate else None,
            "failure": farm.failure or None,
        },
        "restart": {
            "pending": [*restart.moving, *(id_ for id_, _ in restart.pending)],
            "error": restart.error or None,
        },
        "workers": [
            _worker(controller, id_, memory.of(id_), id_ in desired_slots, id_ in drained)
            for id_ in listed
        ],
    }


def _worker(
    controller: Controller, id_: str, record: Record, desired: bool, drained: bool
) -> dict[str, Any]:
    farm, target = controller.farm, controller.current.by_id.get(id_)
    return {
        "id": id_,
        "pid": record.pid or None,
        "port": farm.port_of(id_),
        "device": record.device if record.alive and record.device else target and target.device,
        "state": record.state,
        "desired": desired,
        "drained": drained,
        "restarts": record.restarts,
        "ready_seconds": record.ready_seconds,
        "error": record.error or None,
        "gave_up": record.gave_up or bool(record.waits_for),
        "current": record.spec in ("", target.spec if target else None),
    }
