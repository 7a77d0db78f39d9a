"""The command `gpufarm`. Commands import what they need when they run: help answers at once."""

# Imports are inside of functions on purpose; a command has many options.
# ruff: noqa: PLC0415, PLR0917

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.config.exit_codes import DONE, FAILED

if TYPE_CHECKING:
    from launcher.cli.client import Client
    from launcher.config.settings import Settings
    from launcher.config.state import StateDir
    from launcher.supervision.farm import Farm

app = typer.Typer(
    name="gpufarm",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Default: ./gpufarm.toml.")
]
StateFolder = Annotated[
    Path | None, typer.Option("--state-dir", metavar="DIR", help="Where the farm keeps its files.")
]
HostName = Annotated[str | None, typer.Option("--host", help="Public address.")]
PortNumber = Annotated[int | None, typer.Option("--port", help="Public port.")]
WorkerCount = Annotated[
    str | None, typer.Option("--workers", metavar="auto|N", help="How many workers.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
WorkerId = Annotated[str, typer.Argument(metavar="ID", help="A worker, such as w1.")]


def load_settings(config: Path | None, **overrides: Any) -> Settings:
    """Load the configuration with the command line's overrides. Raises ConfigError."""
    from launcher.config.settings import load

    return load(config, {key.replace("__", "."): value for key, value in overrides.items()})


def load_state_dir(config: Path | None, state_dir: Path | None) -> StateDir:
    from launcher.config.state import StateDir

    if state_dir is not None:  # a farm can be stopped whatever its configuration file says now
        return StateDir(state_dir)
    return StateDir(load_settings(config).state_dir)


def load_running_farm(config: Path | None, state_dir: Path | None) -> tuple[Farm, Client]:
    """Load the running farm and a client of its controller. Raises NotRunningError."""
    from launcher.cli.client import Client, running_farm

    farm = running_farm(load_state_dir(config, state_dir))
    return farm, Client(farm)


def _print_version(requested: bool) -> None:
    if requested:
        from importlib import metadata

        print(metadata.version("gpufarm"))
        raise typer.Exit


@app.callback()
def gpufarm(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """A farm of batch-1 model workers on the GPUs you have: sized, supervised, balanced."""


@app.command()
def up(
    config: ConfigFile = None,
    state_dir: StateFolder = None,
    host: HostName = None,
    port: PortNumber = None,
    workers: WorkerCount = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", "-f", help="Stay and print all logs, for containers.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace a running farm of another file.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Start the farm, or refresh the running one from its configuration.

    Returns when every worker is ready.
    """
    from launcher.cli.output import progress, show_workers
    from launcher.cli.run import run_in_foreground, wait_or_shut_down
    from launcher.cli.up import Up
    from launcher.config.state import StateDir

    settings = load_settings(
        config, state_dir=state_dir, host=host, port=port, workers__count=workers
    )
    state = StateDir(settings.state_dir).create()
    if foreground:
        start = Up(settings, state, lambda line: print(f"gpufarm | {line}", flush=True), replace)
        raise typer.Exit(run_in_foreground(start))
    with progress("starting the farm") as report:
        start = Up(settings, state, report, replace)
        try:
            with state.lock():
                farm = start.bring_up()
            # The lock is free while the workers load, above all for `down`.
            try:
                view = wait_or_shut_down(start, farm)
            finally:
                if len(farm.generations) > 1:
                    start.finish_rollout()
        except KeyboardInterrupt:
            if start.farm is not None:
                report("interrupted; the farm keeps starting: see `gpufarm ps`, or `gpufarm down`")
            raise
    show_workers(farm, view, as_json, with_example=True)


@app.command()
def down(config: ConfigFile = None, state_dir: StateFolder = None, as_json: AsJson = False) -> None:
    """Stop the farm after its requests are finished.

    nginx stops accepting requests first, then every worker ends when its queue is empty.
    """
    from launcher.cli.down import bring_down
    from launcher.cli.output import print_result, progress

    state = load_state_dir(config, state_dir)
    with progress("stopping") as report:
        bring_down(state, report)
    if as_json:
        print_result({"state": "down", "state_dir": str(state.path)})


@app.command()
def ps(config: ConfigFile = None, state_dir: StateFolder = None, as_json: AsJson = False) -> None:
    """Show the workers."""
    from launcher.cli.output import show_workers

    farm, client = load_running_farm(config, state_dir)
    show_workers(farm, client.workers(), as_json)


@app.command()
def plan(
    config: ConfigFile = None,
    state_dir: StateFolder = None,
    workers: WorkerCount = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            "--device",
            metavar="SIZE",
            help="Plan for a hypothetical device of this size, such as 24GiB; repeatable.",
        ),
    ] = None,
    footprint: Annotated[
        str | None, typer.Option("--footprint", metavar="SIZE", help="Memory of one worker.")
    ] = None,
    cores: Annotated[int | None, typer.Option("--cores", help="Cores to plan with.")] = None,
    ram: Annotated[str | None, typer.Option("--ram", metavar="SIZE", help="Host RAM.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure one worker, even if it was measured before.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show how many workers fit, and the arithmetic."""
    from launcher.cli import plan as plan_command
    from launcher.cli.client import NotRunningError, running_farm
    from launcher.config.state import StateDir

    settings = load_settings(config, state_dir=state_dir, workers__count=workers)
    current = None
    if not (device or footprint or measure or workers or ram or cores is not None):
        with suppress(NotRunningError):
            current = running_farm(StateDir(settings.state_dir))
    raise typer.Exit(
        plan_command.run(
            settings,
            devices=device or (),
            footprint=footprint,
            cores=cores,
            ram=ram,
            as_json=as_json,
            measure=measure,
            running=current,
        )
    )


@app.command()
def scale(
    count: Annotated[str, typer.Argument(metavar="N|auto", help="How many workers.")],
    config: ConfigFile = None,
    state_dir: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """Set the number of workers until `down`.

    `auto` restores the configured number.
    """
    from launcher.cli.up import UpError
    from launcher.config.settings import ConfigError

    if count != "auto" and not count.isdecimal():
        raise ConfigError(f"N must be a whole number of at least 0, or auto, got {count}")
    farm, client = load_running_farm(config, state_dir)
    view = client.scale(count if count == "auto" else int(count))
    for warning in view["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    requested, now = view["count"], wait_and_show(farm, as_json)["count"]
    if requested != now:
        raise UpError(f"requested {requested} workers, but another command has set {now} since")


@app.command()
def drain(
    worker: WorkerId,
    config: ConfigFile = None,
    state_dir: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """Let a worker finish its requests, and keep its slot empty.

    `restart` refills it.
    """
    farm, client = load_running_farm(config, state_dir)
    client.drain(worker)
    wait_and_show(farm, as_json)


@app.command()
def restart(
    worker: Annotated[str | None, typer.Argument(metavar="[ID]", help="Default: all.")] = None,
    config: ConfigFile = None,
    state_dir: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """Replace workers one after another.

    Where a slot is free, an extra worker serves meanwhile, so there is no gap.
    """
    farm, client = load_running_farm(config, state_dir)
    client.restart(worker)
    wait_and_show(farm, as_json)


def wait_and_show(farm: Farm, as_json: bool) -> dict[str, Any]:
    """Wait until the workers are as desired, then print them. Returns `GET /workers`."""
    from launcher.cli.output import progress, show_workers
    from launcher.cli.run import wait_for_workers

    with progress("waiting for the workers") as report:
        view = wait_for_workers(farm, report)
    show_workers(farm, view, as_json)
    return view


@app.command()
def logs(
    process: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="w1, nginx, controller, … Default: all.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Keep printing as the logs grow.")
    ] = False,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=0, help="How many of the last lines of each log.")
    ] = 20,
    config: ConfigFile = None,
    state_dir: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """Print the logs of the farm's processes, ordered by time (UTC)."""
    from launcher.cli.client import NotRunningError
    from launcher.cli.log_tail import LogTail
    from launcher.config.settings import ConfigError

    state = load_state_dir(config, state_dir)
    if not state.logs.is_dir():
        raise NotRunningError(f"no logs in {state.path}: no farm has run there")
    tail = LogTail(state.logs, (process,) if process else (), print, lines, as_json)
    if process and not follow and not (state.logs / f"{process}.log").exists():
        known = ", ".join(sorted(path.stem for path in state.logs.glob("*.log"))) or "none"
        raise ConfigError(f"{process} has no log, or has written nothing yet; logs: {known}")
    tail.print_new()
    if follow:
        tail.follow()


@app.command()
def doctor(
    config: ConfigFile = None, state_dir: StateFolder = None, as_json: AsJson = False
) -> None:
    """Check what a farm needs, with a remedy for each failure.

    Tools, ports, devices, disk space, and a stream through the proxy.
    """
    from launcher.cli.doctor import print_findings, run_checks

    findings = run_checks(load_settings(config, state_dir=state_dir))
    print_findings(findings, as_json)
    raise typer.Exit(DONE if all(finding.ok for finding in findings) else FAILED)
