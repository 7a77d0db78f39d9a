"""supervisord's file, read back by supervisord itself; and a real supervisord, spoken to."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from supervisor.options import ServerOptions

from launcher.config.sources import ConfigError
from launcher.supervision.supervisord import (
    CONF,
    MARK,
    Supervisor,
    SupervisorConfig,
    SupervisorError,
    command,
    environment,
    python_module,
    render,
)
from tests.waiting import until

ODD = 'it\'s 100% "odd" (%here) & more'


def config(state: Path, **changes: Any) -> SupervisorConfig:
    settings: dict[str, Any] = {
        "state": state,
        "socket": state / "s.sock",
        "slots": 3,
        "request_timeout": 60.0,
        "nginx_command": python_module("balancer.start", "--prefix", str(state)),
        "stop_whole_group": False,
        "log_bytes": 1000,
        "log_backups": 2,
    }
    return SupervisorConfig(**(settings | changes))


def parse(text: str, folder: Path) -> Any:
    """The file as supervisord understands it."""
    for made in ("run", "logs", f"{ODD}/run", f"{ODD}/logs"):
        (folder / made).mkdir(parents=True)
    (folder / CONF).write_text(text)
    options = ServerOptions()
    options.realize(["-c", str(folder / CONF)])
    options.process_config()
    return options


def test_supervisord_reads_back_what_was_meant(tmp_path: Path) -> None:
    state = tmp_path / ODD
    options = parse(render(config(state)), tmp_path)
    assert options.logfile == str(state / "logs/supervisord.log")
    assert options.pidfile == str(state / "run/supervisord.pid")
    assert options.serverurl == f"unix://{state / 's.sock'}"
    groups = {group.name: group for group in options.process_group_configs}
    workers = groups["worker"].process_configs
    assert [program.name for program in workers] == ["w1", "w2", "w3"]
    last = workers[-1]
    assert shlex.split(last.command)[-4:] == ["--state", str(state), "--slot", "3"]
    assert last.stdout_logfile == str(state / "logs/w3.log")
    assert (last.stdout_logfile_maxbytes, last.stdout_logfile_backups) == (1000, 2)
    assert not last.autostart
    assert not last.autorestart
    assert last.startsecs == 0
    nginx = groups["nginx"].process_configs[0]
    assert shlex.split(nginx.command)[-1] == str(state)
    assert nginx.stopsignal == signal.SIGQUIT
    order = sorted(groups, key=lambda name: groups[name].priority, reverse=True)
    assert order == ["controller", "nginx", "worker"], "the order in which they are stopped"


def test_a_worker_gets_more_time_to_end_than_a_request_may_take(tmp_path: Path) -> None:
    options = parse(render(config(tmp_path, request_timeout=300.0)), tmp_path)
    for group in options.process_group_configs:
        if group.name != "controller":
            assert all(program.stopwaitsecs > 305 for program in group.process_configs)


@pytest.mark.parametrize("external", [True, False])
def test_only_external_servers_are_stopped_as_a_group(tmp_path: Path, external: bool) -> None:
    options = parse(render(config(tmp_path, stop_whole_group=external)), tmp_path)
    group = next(group for group in options.process_group_configs if group.name == "worker")
    assert all(program.stopasgroup is external for program in group.process_configs)
    assert all(program.killasgroup for program in group.process_configs)


@pytest.mark.parametrize("name", ["a ;b", "a #b", "a\nb"])
def test_a_path_that_the_file_cannot_carry_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="state_dir"):
        render(config(Path("/x") / name))


def test_processes_inherit_no_configuration_and_no_other_supervisor_but_their_farms_mark(
    tmp_path: Path,
) -> None:
    given = {"PATH": "/bin", "GPUFARM_PORT": "1", "SUPERVISOR_SERVER_URL": "unix:///x", "A": "b"}
    kept = {"PATH": "/bin", "A": "b", "GPUFARM_FARM": str(tmp_path)}
    assert environment(tmp_path, given) == kept
    (tmp_path / "link").symlink_to(tmp_path)
    assert environment(tmp_path / "link", given | {MARK: "/another"}) == kept


SIMPLE = """
[unix_http_server]
file = {socket}
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[rpcinterface:farm]
supervisor.rpcinterface_factory = launcher.supervision.rpc_interface:make_interface
[supervisord]
nodaemon = true
silent = true
logfile = {folder}/supervisord.log
pidfile = {folder}/supervisord.pid
[program:worker]
command = sh -c "trap 'exit 0' TERM; [ %(process_num)d = 2 ] && exit 3; while :; do sleep 0.1; done"
process_name = w%(process_num)d
numprocs = 2
numprocs_start = 1
autostart = false
autorestart = false
startsecs = 0
stdout_logfile = NONE
stderr_logfile = NONE
"""


def test_talking_to_a_real_supervisord(tmp_path: Path) -> None:
    socket = tmp_path / "s.sock"
    (tmp_path / CONF).write_text(SIMPLE.format(socket=socket, folder=tmp_path))
    supervisor = Supervisor(socket)
    assert not supervisor.alive()
    with pytest.raises(SupervisorError, match="does not respond"):
        supervisor.processes()
    process = subprocess.Popen(command(tmp_path), env=environment(tmp_path))
    try:
        until(supervisor.alive, "supervisord answers")
        assert supervisor.pid() == process.pid
        assert {info.state for info in supervisor.processes().values()} == {"STOPPED"}
        for name in ("w1", "w2"):
            supervisor.start(name)
        w2 = until(lambda: exited(supervisor, "w2"), "w2 ends")
        assert w2.exit_code == 3
        w1 = supervisor.processes()["w1"]
        assert w1.alive
        supervisor.start("w1")
        assert supervisor.processes()["w1"].pid == w1.pid, "started once"
        os.kill(w1.pid, signal.SIGKILL)
        assert until(lambda: exited(supervisor, "w1"), "w1 ends").exit_code == -1
        supervisor.start("w1")
        supervisor.stop("w1")
        until(lambda: not supervisor.processes()["w1"].alive, "w1 stops")
        supervisor.stop("w1")
        with pytest.raises(SupervisorError, match="BAD_NAME"):
            supervisor.start("w9")
        supervisor.shutdown()
        assert process.wait(20) == 0
        assert not supervisor.alive()
    finally:
        supervisor.close()
        process.kill()
        process.wait()


def exited(supervisor: Supervisor, name: str) -> Any:
    info = supervisor.processes()[name]
    return info if info.state == "EXITED" else None
