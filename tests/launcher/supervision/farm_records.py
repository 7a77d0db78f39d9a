"""Farms as records: what tests need of one without starting it."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.config.settings import Settings
from launcher.config.state import StateDir
from launcher.planning.plan import Plan
from launcher.supervision.farm import Farm, Generation
from launcher.supervision.worker_command import sources_digest


def generation_of(settings: Settings, planned: Plan, number: int = 1) -> Generation:
    """A generation as `up` would write it."""
    return Generation(number, settings, planned, sources_digest(settings))


def farm_of(settings: Settings, planned: Plan, ports: Sequence[int] = ()) -> Farm:
    """A farm in the settings' state directory whose only generation this is."""
    chosen = tuple(ports) or tuple(range(21001, 21001 + planned.capacity))
    generation = generation_of(settings, planned.with_ports(chosen))
    return Farm(StateDir(settings.state_dir), generation, chosen)
