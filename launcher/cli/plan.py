"""`gpufarm plan`: show what would run where, and why. Starts nothing except with --measure."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from launcher.cli import output
from launcher.config.exit_codes import DOES_NOT_FIT, DONE, FAILED
from launcher.config.settings import Settings
from launcher.config.sizes import format_size, parse_size_with_unit
from launcher.config.sources import ConfigError
from launcher.config.state import StateDir
from launcher.planning import sizing
from launcher.planning.devices import discover, hypothetical_devices
from launcher.planning.host import overridden
from launcher.planning.inventory import Device, Footprint, Host
from launcher.planning.plan import Plan

if TYPE_CHECKING:
    from launcher.supervision.farm import Farm

FOOTPRINT_UNKNOWN = (
    "the footprint of one worker is unknown; measure it with `gpufarm plan --measure` (starts "
    "one worker and ends it again) or `gpufarm up`, or set it with --footprint 7GiB or "
    'footprint.bytes = "7GiB"'
)


def run(
    settings: Settings,
    devices: Sequence[str] = (),
    footprint: str | None = None,
    *,
    cores: int | None = None,
    ram: str | None = None,
    as_json: bool = False,
    measure: bool = False,
    running: Farm | None = None,
) -> int:
    """Print the plan. Returns the exit code: 0, 1 (footprint unknown) or 3 (does not fit).

    ``devices``: sizes of hypothetical devices; then this host is ignored, except for ``cores``,
    ``ram`` and a footprint that was measured on it. ``running``: the farm that runs, whose plan
    is printed as it is, because its own workers hold the memory.
    Raises ConfigError, and MeasureError where measuring fails.
    """
    if running is not None and not (devices or footprint or measure):
        notes: tuple[str, ...] = ("The plan of the running farm, as it was when it started:",)
        if running.settings.planned_from != settings.planned_from:
            notes = ("The configuration has changed since; apply it with `gpufarm up`.", *notes)
        return _print_plan(running.plan, as_json, notes)
    if cores is not None and cores < 1:
        raise ConfigError(f"--cores must be a whole number of at least 1, got {cores}")
    known = _footprint(footprint)
    if known and measure:
        raise ConfigError("--footprint and --measure are mutually exclusive; remove one of them")
    chosen, notes = hypothetical_devices(devices), ()
    host = Host(cores, _size("--ram", ram), _size("--ram", ram), "given", "given")
    if not (devices and known):
        found_host = overridden(sizing.read_host(settings), cores or 0, _size("--ram", ram))
        here = discover(found_host, settings.budget.devices)
        if not devices:
            host, chosen, notes = found_host, here.devices, here.notes
        known = known or _footprint_of(settings, here.devices, measure)
        if measure and settings.footprint.bytes:
            configured = format_size(settings.footprint.bytes)
            notes += (f"`up` uses footprint.bytes = {configured} instead.",)
    if known is None:
        return _print_unknown(chosen, notes, as_json)
    return _print_plan(sizing.build_plan(settings, chosen, host, known), as_json, notes)


def _footprint(text: str | None) -> Footprint | None:
    size = _size("--footprint", text)
    return Footprint.given(size) if size else None


def _size(option: str, text: str | None) -> int | None:
    if not text:
        return None
    try:
        return parse_size_with_unit(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text}: {error}") from None


def _footprint_of(settings: Settings, devices: Sequence[Device], measure: bool) -> Footprint | None:
    """Return the footprint on this host's devices: measured now, or known already."""
    if not measure:
        return sizing.known_footprint(settings, devices, StateDir(settings.state_dir))
    # A plan that measures nothing need not import what starts processes.
    from launcher.supervision.measurement_worker import measurement_start  # noqa: PLC0415

    state = StateDir(settings.state_dir).create()
    with state.lock():
        return sizing.measure_footprint(
            settings,
            devices,
            state,
            measurement_start(settings, state),
            progress=lambda line: print(line, file=sys.stderr),
            again=True,
        )


def _print_plan(plan: Plan, as_json: bool, notes: Sequence[str]) -> int:
    if as_json:
        output.print_result({**plan.to_json(), "notes": list(notes)})
    else:
        output.print_plan(plan, output.console(), notes)
    if plan.refusal:
        print(f"gpufarm: {plan.refusal}", file=sys.stderr)
        return DOES_NOT_FIT
    return DONE


def _print_unknown(devices: Sequence[Device], notes: Sequence[str], as_json: bool) -> int:
    if as_json:
        rows = [{"device": asdict(device), "workers": None} for device in devices]
        unknown = {"devices": rows, "total_workers": None, "footprint": None, "notes": [*notes]}
        output.print_result({**unknown, "message": FOOTPRINT_UNKNOWN})
    else:
        output.print_devices(devices, output.console(), notes)
    print(f"gpufarm: {FOOTPRINT_UNKNOWN}", file=sys.stderr)
    return FAILED
