"""The command `gpufarm`. Commands import what they need when they run: help answers at once."""

# Imports inside functions are the point here; options are many by nature.
# ruff: noqa: PLC0415, PLR0917

from __future__ import annotations

import json
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


def settings_of(config: Path | None, **overrides: Any) -> Settings:
    """The configuration, with what the command line says. Raises ConfigError."""
    from launcher.config.settings import load

    return load(config, {key.replace("__", "."): value for key, value in overrides.items()})


def state_of(config: Path | None, state_dir: Path | None) -> StateDir:
    from launcher.config.state import StateDir

    return StateDir(settings_of(config, state_dir=state_dir).state_dir)


def running(config: Path | None, state_dir: Path | None) -> tuple[Farm, Client]:
    """The farm that runs there, and its controller. Raises NotRunningError."""
    from launcher.cli.client import Client, running_farm

    farm = running_farm(state_of(config, state_dir))
    return farm, Client(farm)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        print(metadata.version("gpufarm"))
        raise typer.Exit


@app.callback()
def gpufarm(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
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
        bool, typer.Option("--foreground", "-f", help="Stay, and print all logs: for containers.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace a running farm of another file.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Start the farm, or bring the running one to its file.

    Returns when every worker is ready.
    """
    from launcher.cli.progress import progress
    from launcher.cli.up import Up
    from launcher.config.state import StateDir

    settings = settings_of(
        config, state_dir=state_dir, host=host, port=port, workers__count=workers
    )
    state = StateDir(settings.state_dir).create()
    if foreground:
        from launcher.cli.foreground import stay

        run = Up(settings, state, lambda line: print(f"gpufarm | {line}", flush=True), replace)
        raise typer.Exit(stay(run))
    with progress("bringing the farm up") as say:
        run = Up(settings, state, say, replace)
        try:
            with state.lock():
                farm = run.bring_up()
            # Other commands may go on while the workers load: `down` above all.
            try:
                view = run.wait_or_end(farm)
            finally:
                if len(farm.generations) > 1:
                    run.finish()
        except KeyboardInterrupt:
            if run.farm is not None:
                say("interrupted; the farm goes on starting: see `gpufarm ps`, or `gpufarm down`")
            raise
    show(farm, view, as_json, closing=True)


def show(farm: Farm, view: dict[str, Any], as_json: bool, closing: bool = False) -> None:
    """Print the workers; ``closing`` adds where the farm is and how to try it."""
    if as_json:
        print(json.dumps(view, indent=2))
        return
    from launcher.cli.listing import curl_line, print_workers
    from launcher.cli.report import console

    print_workers(view, console())
    if closing and not any(worker["state"] == "ready" for worker in view["workers"]):
        print(f"\n{farm.url} answers 503: no worker is wanted. `gpufarm scale 1` starts one,")
        print("`gpufarm restart w1` refills a drained slot.")
    elif closing:
        print(f"\nReady at {farm.url}. Try:\n  {curl_line(farm, view)}")


@app.command()
def down(config: ConfigFile = None, state_dir: StateFolder = None, as_json: AsJson = False) -> None:
    """Stop the farm, once it has finished what it has.

    First nginx stops to take requests, then every worker ends when its line is empty.
    """
    from launcher.cli.down import bring_down
    from launcher.cli.progress import progress

    state = state_of(config, state_dir)
    with progress("stopping") as say:
        bring_down(state, say)
    if as_json:
        print(json.dumps({"state": "down", "state_dir": str(state.path)}, indent=2))


@app.command()
def ps(config: ConfigFile = None, state_dir: StateFolder = None, as_json: AsJson = False) -> None:
    """Show the workers."""
    farm, client = running(config, state_dir)
    show(farm, client.workers(), as_json)


@app.command()
def plan(
    config: ConfigFile = None,
    state_dir: StateFolder = None,
    workers: WorkerCount = None,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", metavar="SIZE", help="Plan for a device of 24GiB; repeatable."),
    ] = None,
    footprint: Annotated[
        str | None, typer.Option("--footprint", metavar="SIZE", help="Memory of one worker.")
    ] = None,
    cores: Annotated[int | None, typer.Option("--cores", help="Cores to plan with.")] = None,
    ram: Annotated[str | None, typer.Option("--ram", metavar="SIZE", help="Host RAM.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure one worker alone, also if it was before.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show how many workers fit, and the arithmetic."""
    from launcher.cli import plan as plan_command
    from launcher.cli.client import NotRunningError, running_farm
    from launcher.config.state import StateDir

    settings = settings_of(config, state_dir=state_dir, workers__count=workers)
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
    """Have N workers; it lasts until `down`.

    `auto` brings back what the configuration says.
    """
    from launcher.cli.up import UpError
    from launcher.config.settings import ConfigError

    if count != "auto" and not count.isdecimal():
        raise ConfigError(f"{count}: must be a whole number from 0, or auto")
    farm, client = running(config, state_dir)
    view = client.scale(count if count == "auto" else int(count))
    for warning in view["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    asked, now = view["count"], settle(farm, as_json)["count"]
    if asked != now:
        raise UpError(f"asked for {asked} workers, but another command has set {now} meanwhile")


@app.command()
def drain(
    worker: WorkerId,
    config: ConfigFile = None,
    state_dir: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """Let a worker finish, and keep its slot empty.

    `restart` refills it.
    """
    farm, client = running(config, state_dir)
    client.drain(worker)
    settle(farm, as_json)


@app.command()
def restart(
    worker: Annotated[str | None, typer.Argument(metavar="[ID]", help="Default: all.")] = None,
    config: ConfigFile = None,
    state_dir: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """Replace workers one after another.

    Where a slot is free, one more serves meanwhile, so there is no gap.
    """
    farm, client = running(config, state_dir)
    client.restart(worker)
    settle(farm, as_json)


def settle(farm: Farm, as_json: bool) -> dict[str, Any]:
    """Wait until what was asked for has happened, and show the result."""
    from launcher.cli.progress import progress
    from launcher.cli.up import Up

    with progress("waiting for the workers") as say:
        view = Up(farm.settings, farm.state, say).wait(farm)
    show(farm, view, as_json)
    return view


@app.command()
def logs(
    process: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="w1, nginx, controller, … Default: all.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as they grow.")] = False,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=0, help="How many to begin with.")
    ] = 20,
    config: ConfigFile = None,
    state_dir: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """Print the logs of the farm's processes, in the order of time (UTC)."""
    from launcher.cli.client import NotRunningError
    from launcher.cli.log_tail import Follower
    from launcher.config.settings import ConfigError

    state = state_of(config, state_dir)
    if not state.logs.is_dir():
        raise NotRunningError(f"there are no logs in {state.path}; no farm has run there")
    follower = Follower(state.logs, (process,) if process else (), print, lines, as_json)
    if process and not follow and not (state.logs / f"{process}.log").exists():
        there = ", ".join(sorted(path.stem for path in state.logs.glob("*.log"))) or "none"
        raise ConfigError(
            f"{process}: it has written nothing yet, or does not exist; logs: {there}"
        )
    follower.show_new()
    if follow:
        follower.follow()


@app.command()
def doctor(
    config: ConfigFile = None, state_dir: StateFolder = None, as_json: AsJson = False
) -> None:
    """Check what a farm needs, and say what to do.

    Tools, ports, devices, space, and a stream through the proxy.
    """
    from launcher.cli.doctor import examine, print_findings

    findings = examine(settings_of(config, state_dir=state_dir))
    print_findings(findings, as_json)
    raise typer.Exit(DONE if all(finding.fine for finding in findings) else FAILED)
