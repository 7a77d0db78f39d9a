"""The configuration: sources and their order, and one line for each error."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from launcher.config import sources
from launcher.config.settings import DEMO_TARGET, ConfigError, Settings, load
from launcher.config.sizes import GIB, MIB, format_size, parse_size
from tests.repository import REPOSITORY

HOME = {"HOME": "/home/someone"}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_config(folder: Path, text: str) -> Path:
    path = folder / "gpufarm.toml"
    path.write_text(text, encoding="utf-8")
    return path


def error_of(toml: str, folder: Path, environ: dict[str, str], **overrides: Any) -> str:
    path = write_config(folder, toml) if toml else None
    with pytest.raises(ConfigError) as caught:
        load(path, overrides, HOME | environ)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_defaults_serve_the_demo_voice(elsewhere: Path) -> None:
    settings = load(None, {}, HOME)
    assert settings.model.target == DEMO_TARGET
    assert settings.model.name == "demo"
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.state_dir == Path("/home/someone/.local/state/gpufarm")
    assert settings.folder == elsewhere
    assert settings.config_file is None


def test_state_follows_xdg(elsewhere: Path) -> None:
    assert load(None, {}, {"XDG_STATE_HOME": "/s"}).state_dir == Path("/s/gpufarm")
    assert load(None, {}, HOME | {"XDG_STATE_HOME": "odd"}).state_dir.is_absolute()


def test_later_sources_win_key_by_key(elsewhere: Path) -> None:
    write_config(
        elsewhere, "port = 1\nhost = '::1'\n[workers]\ncount = 1\nmax = 2\nqueue_size = 3\n"
    )
    environ = HOME | {"GPUFARM_PORT": "2", "GPUFARM_WORKERS__COUNT": "2"}
    settings = load(None, {"port": 3, "host": None, "workers.max": 4}, environ)
    assert (settings.port, settings.host) == (3, "::1")
    assert settings.workers.count == 2
    assert settings.workers.max == 4
    assert settings.workers.queue_size == 3


def test_the_file_is_found_by_option_then_variable_then_default(elsewhere: Path) -> None:
    write_config(elsewhere, "port = 1")
    (elsewhere / "b.toml").write_text("port = 2", encoding="utf-8")
    (elsewhere / "c.toml").write_text("port = 3", encoding="utf-8")
    assert load(None, {}, HOME).port == 1
    assert load(None, {}, HOME | {"GPUFARM_CONFIG": "b.toml"}).port == 2
    assert load(Path("c.toml"), {}, HOME | {"GPUFARM_CONFIG": "b.toml"}).port == 3
    assert "no such file" in error_of("", elsewhere, {"GPUFARM_CONFIG": "d.toml"})


def test_relative_paths_are_relative_to_the_file(elsewhere: Path) -> None:
    folder = elsewhere / "deep"
    folder.mkdir()
    path = write_config(
        folder,
        'state_dir = "state"\n[workers]\npath = ["models", "/abs"]\n'
        '[footprint]\nrequests = [{path = "/predict", body_file = "x.wav"}]\n',
    )
    settings = load(path, {}, HOME)
    assert settings.state_dir == folder / "state"
    assert settings.import_path == (folder, folder / "models", Path("/abs"))
    assert settings.footprint.requests[0].body_file == folder / "x.wav"


def test_an_empty_variable_is_unset(elsewhere: Path) -> None:
    environ = HOME | {"GPUFARM_PORT": "", "GPUFARM_NONSENSE": "", "GPUFARM_CONFIG": ""}
    assert load(None, {}, environ).port == 8000


def test_an_empty_string_in_the_file_is_the_default(elsewhere: Path) -> None:
    write_config(elsewhere, 'state_dir = ""\n[budget]\nmemory = ""\nheadroom = ""\nram = ""\n')
    assert load(None, {}, HOME) == load(None, {"port": 8000}, HOME)
    assert load(None, {}, HOME).state_dir == Path("/home/someone/.local/state/gpufarm")


def test_variables_set_lists_tables_and_sizes(elsewhere: Path) -> None:
    environ = HOME | {
        "GPUFARM_MODEL__COMMAND": "python 'my server.py' --port {port}",
        "GPUFARM_MODEL__ALIASES": "tts-1, tts-1-hd",
        "GPUFARM_MODEL__ENVIRONMENT__HF_HOME": "/cache",
        "GPUFARM_FOOTPRINT__BYTES": "7GiB",
        "GPUFARM_BUDGET__DEVICES": "[0, 1]",
        "GPUFARM_WORKERS__COUNT": "auto",
    }
    settings = load(None, {}, environ)
    assert settings.model.command == ("python", "my server.py", "--port", "{port}")
    assert settings.model.aliases == ("tts-1", "tts-1-hd")
    assert settings.model.environment == {"HF_HOME": "/cache"}
    assert settings.footprint.bytes == 7 * GIB
    assert settings.budget.devices == ("0", "1")
    args = load(
        None, {}, HOME | {"GPUFARM_MODEL__ARGS__size": "3", "GPUFARM_MODEL__ARGS__Name": "x"}
    )
    assert args.model.args == {"size": 3, "Name": "x"}


def test_variables_of_a_kubernetes_service_named_gpufarm_are_ignored(elsewhere: Path) -> None:
    environ = HOME | {
        "GPUFARM_PORT": "tcp://10.0.0.1:8000",
        "GPUFARM_SERVICE_HOST": "10.0.0.1",
        "GPUFARM_SERVICE_PORT": "8000",
        "GPUFARM_SERVICE_PORT_HTTP": "8000",
        "GPUFARM_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "GPUFARM_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    assert load(None, {}, environ).port == 8000


def test_a_command_replaces_a_target_of_a_weaker_source(elsewhere: Path) -> None:
    write_config(elsewhere, '[model]\ntarget = "hello:Hello"\n[footprint]\nbytes = "1GiB"')
    assert load(None, {}, HOME).model.name == "hello"
    replaced = load(None, {"model.command": ["serve", "{port}"]}, HOME).model
    assert (replaced.target, replaced.command) == ("", ("serve", "{port}"))


@pytest.mark.parametrize(
    ("toml", "environ", "words"),
    [
        ("workers.count = -1", {}, ['gpufarm.toml: workers.count = -1: must be "auto" or a whole']),
        ("workers.count = 0", {}, ["workers.count = 0"]),
        ('workers.count = "many"', {}, ['workers.count = "many"', "auto"]),
        ("workers.count = 1.5", {}, ["workers.count = 1.5"]),
        ("workers.max = 1000", {}, ["workers.max = 1000: must be a whole number from 1 to 256"]),
        (
            "workers.request_timeout = 0",
            {},
            ["workers.request_timeout = 0: must be a number of seconds above 0"],
        ),
        ("workers.threads = true", {}, ["workers.threads = true", "number"]),
        ("port = 70000", {}, ["port = 70000: must be a port from 1 to 65535"]),
        ("prot = 1", {}, ["gpufarm.toml: prot = 1", "did you mean port?"]),
        ("count = 1", {}, ["did you mean workers.count?"]),
        ("[worker]\ncount = 1", {}, ["worker", "did you mean workers"]),
        ("[workers]\ncuont = 1", {}, ["workers.cuont", "did you mean workers.count?"]),
        ("workers = 3", {}, ["workers = 3: must be a section"]),
        ("footprint.bytes = 'seven'", {}, ['footprint.bytes = "seven"', '"7GiB"']),
        ("budget.headroom = -5", {}, ["budget.headroom = -5", "must be a size"]),
        ("model.target = 'voice'", {}, ['model.target = "voice": must be "package.module:Class"']),
        ("model = {target = 'a:B', command = ['c', '{port}']}", {}, ["both target and command"]),
        ("model.target = ''", {}, ["neither target"]),
        ("model.command = ['c']", {}, ["{port}"]),
        ("model.command = ['c', '{port}', '{devce}']", {}, ["{devce}", "{device}"]),
        ("model.command = ['c', '{port}']", {}, ["footprint.requests", "footprint.bytes"]),
        ("model.ready_url = 'health'", {}, ['ready_url = "health"', "begins with"]),
        ("model.aliases = [3]", {}, ["model.aliases.0 = 3", "must be a list of names"]),
        ("footprint.requests = [{path = 'x'}]", {}, ["footprint.requests.0.path"]),
        (
            "footprint.requests = [{path = '/x', json = 1, body_file = 'b'}]",
            {},
            ["footprint.requests.0", "both"],
        ),
        ("footprint.requests = [{path = '/x', jsno = 1}]", {}, ["jsno", "unknown key"]),
        ("port = ", {}, ["gpufarm.toml: not TOML", "Invalid value"]),
        ("", {"GPUFARM_WORKER__COUNT": "2"}, ["did you mean GPUFARM_WORKERS__COUNT?"]),
        (
            "",
            {"GPUFARM_WORKERS": "2"},
            ["GPUFARM_WORKERS: unknown setting", "keys are GPUFARM_WORKERS__COUNT"],
        ),
        ("", {"GPUFARM_PORT": "http"}, ['GPUFARM_PORT = "http": must be a port']),
        ("", {"GPUFARM_WORKERS__COUNT": "-1"}, ['GPUFARM_WORKERS__COUNT = "-1": must be "auto"']),
        ("", {"GPUFARM_MODEL__ARGS": "{"}, ["GPUFARM_MODEL__ARGS: must be JSON"]),
        ("", {"GPUFARM_MODEL__COMMAND": "a 'b"}, ["GPUFARM_MODEL__COMMAND: must be a command"]),
        ("logs.format = 'xml'", {}, ['logs.format = "xml": must be "text" or "json"']),
        ("", {"GPUFARM_CONFIG_FILE": "x"}, ["GPUFARM_CONFIG_FILE", "unknown setting"]),
        ("config_file = 'x'", {}, ["config_file", "unknown key"]),
    ],
)
def test_one_line_names_the_key_the_value_and_the_remedy(
    toml: str, environ: dict[str, str], words: list[str], elsewhere: Path
) -> None:
    line = error_of(toml, elsewhere, environ)
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("toml", "environ"),
    [
        ("", {"GPUFARM_MODEL__ENVIROMENT__HF_TOKEN": "hf_abc123"}),
        ("", {"GPUFARM_HF_HOME": "hf_abc123"}),
        ("", {"GPUFARM_MODEL__ENVIRONMENT": "HF_HOME=hf_abc123"}),
        ("", {"GPUFARM_MODEL__ARGS": "{'api': 'hf_abc123'}"}),
        ("", {"GPUFARM_MODEL__READY_URL": "token=hf_abc123"}),
        ("", {"GPUFARM_MODEL__COMMAND": "serve --x 'hf_abc123"}),
        ("model.enviroment.HOME_OF_IT = 'hf_abc123'", {}),
        ("model.enviroment = 'hf_abc123'", {}),
        ("enviroment = [{HF_HOME = 'hf_abc123'}]", {}),
        ("hf_token = 'hf_abc123'", {}),
        ("model.environment.A = ['hf_abc123']", {}),
        ("model.environment = ['hf_abc123']", {}),
        ("model.command = 'serve --api-key hf_abc123'", {}),
        ("model = ['hf_abc123', {environment = 'x'}, 'the password']", {}),
        ("footprint.requests = [{path = '/x', jsno = 'hf_abc123'}]", {}),
        ("footprint.requests = [{path = 'x', json = 'hf_abc123', content_type = 'auth'}]", {}),
    ],
)
def test_a_possible_secret_is_hidden(toml: str, environ: dict[str, str], elsewhere: Path) -> None:
    assert "hf_abc123" not in error_of(toml, elsewhere, environ)


def test_a_number_in_place_of_a_secret_is_hidden_too(elsewhere: Path) -> None:
    line = error_of("model.environment.PIN = 4711", elsewhere, {})
    assert line == "gpufarm.toml: model.environment.PIN = (hidden): must be a table of strings"
    assert "4711" not in error_of("model.enviroment.pin_token = 4711", elsewhere, {})
    assert "4711" not in error_of("api_key = 4711", elsewhere, {})


def test_the_variable_that_marks_a_farms_processes_is_ignored(elsewhere: Path) -> None:
    assert load(None, {}, HOME | {"GPUFARM_FARM": "/somewhere"}).port == 8000


def test_the_command_line_is_named_as_the_source(elsewhere: Path) -> None:
    line = error_of("port = 9", elsewhere, {}, port=-1)
    assert line == "command line: port = -1: must be a port from 1 to 65535"


def test_several_problems_are_counted(elsewhere: Path) -> None:
    assert error_of("port = 0\nworkers.max = 0", elsewhere, {}).endswith("(and 1 more)")


def test_an_unreadable_file_is_one_line(elsewhere: Path) -> None:
    (elsewhere / "gpufarm.toml").write_bytes(b"host = '\xff'")
    with pytest.raises(ConfigError, match="not TOML"):
        load(None, {}, HOME)
    with pytest.raises(ConfigError, match="a folder"):
        load(elsewhere, {}, HOME)


def test_settings_survive_json_whatever_the_environment(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = HOME | {"GPUFARM_FOOTPRINT__BYTES": "7GiB", "GPUFARM_MODEL__COMMAND": "x {port}"}
    settings = load(None, {"footprint.requests": [{"path": "/p", "json": {"a": 1}}]}, environ)
    recorded = json.loads(json.dumps(settings.to_json()))
    monkeypatch.setenv("GPUFARM_PORT", "1")
    assert Settings.from_json(recorded) == settings


def _uncommented(text: str) -> str:
    """The example with its settings switched on: ``#key = value`` is one, ``# words`` is prose."""
    return re.sub(r"^#(?=\w)", "", text, flags=re.MULTILINE)


def test_the_example_holds_exactly_the_keys_and_their_defaults(elsewhere: Path) -> None:
    text = (REPOSITORY / "gpufarm.example.toml").read_text(encoding="utf-8")
    assert not any(tomllib.loads(text).values()), "as it stands, the example changes nothing"
    values = tomllib.loads(_uncommented(text))
    keys = {
        f"{section}.{key}" if isinstance(inside, dict) else section
        for section, inside in values.items()
        for key in (inside if isinstance(inside, dict) else [section])
    }
    assert keys == set(sources.all_keys(Settings))
    example = write_config(elsewhere, _uncommented(text))
    with_example = load(example, {}, HOME)
    plain = load(None, {"state_dir": with_example.state_dir}, {**HOME, "GPUFARM_CONFIG": ""})
    assert with_example.to_json() == plain.to_json() | {"config_file": str(example)}


def test_reading_the_configuration_imports_nothing_heavy() -> None:
    heavy = ["rich", "typer", "httpx", "torch", "onnxruntime", "starlette", "uvicorn", "asyncio"]
    code = (
        "import sys; from launcher.config import settings, state; "
        "from launcher.planning import plan; "
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.stdout.strip() == "[]", run.stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("7GiB", 7 * GIB),
        ("7 gib", 7 * GIB),
        ("7G", 7 * GIB),
        ("7GB", 7 * 10**9),
        ("1.5GiB", 3 * GIB // 2),
        ("512MiB", 512 * MIB),
        ("1024", 1024),
        ("0", 0),
        (1024, 1024),
        (1024.0, 1024),
    ],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "7 apples", "1e3", -1, True, 1.5, None, []])
def test_an_invalid_size_is_an_error(text: object) -> None:
    with pytest.raises(ValueError, match="must be a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (7 * GIB, "7 GiB"), (24481313588, "22.8 GiB"), (-MIB, "-1 MiB")],
)
def test_formatted_sizes(size: int, text: str) -> None:
    assert format_size(size) == text
