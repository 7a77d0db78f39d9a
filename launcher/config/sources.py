"""Where the configuration comes from, and how an error in it is told: one line that names the
source, the key, the value and the remedy.

Plain pydantic with forty lines of reading, not pydantic-settings: that one costs 0.1 s at every
start, does not notice unknown variables, and forgets which source a bad value came from.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

PREFIX = "GPUFARM_"
FILE_NAME = "gpufarm.toml"

_NOT_KEYS = {"GPUFARM_CONFIG", "GPUFARM_WORKER_ID", "GPUFARM_CACHE_DIR", "GPUFARM_FARM"}
_NOT_KEY_PATTERNS = re.compile(
    r"GPUFARM_TEST_.*"
    # Kubernetes and Docker links give these to every container beside a service named gpufarm.
    r"|GPUFARM_SERVICE_(HOST|PORT(_.*)?)|GPUFARM_PORT_\d+_(TCP|UDP)(_.*)?"
)

HIDDEN = "(hidden)"
"""Shown in an error message in place of a value that may be a secret."""
_SECRET = re.compile(r"token|secret|passw|key|credential|auth", re.IGNORECASE)
_ENVIRONMENT = "environment"
"""The table whose values are never shown, wherever it stands."""


class ConfigError(Exception):
    """The configuration cannot be used. The message is one line; the exit code is 2."""


@dataclass
class Layer:
    """One source's values, nested as in the file."""

    label: str
    values: dict[str, Any]
    names: dict[tuple[str, ...], str] = field(default_factory=dict)
    """Key path → how this source spells it, where it is not the dotted key."""

    def has(self, path: tuple[str | int, ...]) -> bool:
        node: Any = self.values
        for part in path:
            try:
                node = node[part]
            except (KeyError, IndexError, TypeError):
                return False
        return True


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that ``name`` was probably meant to be; empty when none is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else ""


def find_file(config_file: Path | None, environ: Mapping[str, str]) -> Path | None:
    """``--config``, else ``$GPUFARM_CONFIG``, else ``./gpufarm.toml`` where it exists."""
    named = config_file or environ.get("GPUFARM_CONFIG") or None
    path = Path(named) if named else Path(FILE_NAME)
    path = path.expanduser().absolute()
    if path.is_file():
        return path
    if named:
        origin = "--config" if config_file else "GPUFARM_CONFIG"
        kind = "a folder, not a file" if path.is_dir() else "no such file"
        raise ConfigError(f"{origin} = {named}: {kind}; name an existing {FILE_NAME}")
    return None


def read(
    schema: type[BaseModel],
    path: Path | None,
    overrides: Mapping[str, Any],
    environ: Mapping[str, str],
) -> list[Layer]:
    """The layers, strongest first. Raises ConfigError for unknown keys and unreadable files."""
    layers = [_command_line(overrides), _environment(schema, environ)]
    if path:
        layers.append(_file(path))
    for layer in layers:
        _check_keys(schema, layer)
    return layers


def merge(layers: list[Layer]) -> dict[str, Any]:
    """Later wins, key by key; naming one of model.target and model.command drops a weaker other."""
    merged: dict[str, Any] = {}
    for layer in reversed(layers):
        model = layer.values.get("model")
        if isinstance(model, dict) and isinstance(below := merged.get("model"), dict):
            for one, other in (("target", "command"), ("command", "target")):
                if model.get(one) and other not in model:
                    below.pop(other, None)
        _deep_update(merged, layer.values)
    return merged


def _deep_update(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _deep_update(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _command_line(overrides: Mapping[str, Any]) -> Layer:
    values: dict[str, Any] = {}
    for name, value in overrides.items():
        node = values
        *parents, last = name.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        if isinstance(value, Mapping):
            inner = {key: item for key, item in value.items() if item is not None}
            _deep_update(node.setdefault(last, {}), inner)
        elif value is not None:
            node[last] = value
    return Layer("command line", values)


def _environment(schema: type[BaseModel], environ: Mapping[str, str]) -> Layer:
    """``GPUFARM_WORKERS__COUNT=2``. An empty variable is unset; tables keep their keys' case."""
    layer = Layer("environment", {})
    for variable, text in sorted(environ.items()):
        if not variable.startswith(PREFIX) or not text or variable in _NOT_KEYS:
            continue
        if _NOT_KEY_PATTERNS.fullmatch(variable):
            continue
        if variable == "GPUFARM_PORT" and text.startswith(("tcp://", "udp://")):
            continue  # a Kubernetes service named gpufarm again
        path, info = _resolve(schema, variable.removeprefix(PREFIX).split("__"))
        if info is None:
            known = _variables(schema)
            guess = nearest(variable, known)
            hint = f"did you mean {guess}?" if guess else "unset it"
            if inner := [name for name in known if name.startswith(f"{variable}__")]:
                hint = f"its keys are {', '.join(inner)}"
            # Its value may be anything, such as a token under a misspelt name: it is not shown.
            raise ConfigError(f"{variable}: there is no such setting; {hint}")
        node = layer.values
        for parent in path[:-1]:
            node = node.setdefault(parent, {})
        node[path[-1]] = _parse(variable, text, info, path)
        layer.names[tuple(path)] = variable
    return layer


def _resolve(schema: type[BaseModel], parts: list[str]) -> tuple[list[str], FieldInfo | None]:
    """The key path that a variable means, and the field it sets; None where there is none."""
    path: list[str] = []
    model: type[BaseModel] = schema
    for depth, part in enumerate(parts):
        info = _keys(model).get(part.lower())
        if info is None:
            return path, None
        path.append(part.lower())
        rest = parts[depth + 1 :]
        if section := _section(info):
            model = section
        elif rest and get_origin(info.annotation) is dict:
            return [*path, "__".join(rest)], info
        else:
            return path, None if rest else info
    return path, None  # a section, not a key


def _parse(variable: str, text: str, info: FieldInfo, path: list[str]) -> Any:
    """A variable's text as the kind of value that its field takes."""
    kind = get_origin(info.annotation)
    if kind is dict and len(path) > 2:  # one key of a table
        return text if get_args(info.annotation)[1] is str else _json_or_text(text)
    if kind not in (dict, tuple):
        return text
    if kind is tuple and not text.lstrip().startswith("["):
        if path[-1] == "command":
            try:
                return shlex.split(text)
            except ValueError as error:
                raise ConfigError(f"{variable}: must be a command line ({error})") from None
        return [item.strip() for item in text.split(",") if item.strip()]
    try:
        return json.loads(text)
    except ValueError as error:  # it tells the place, not the text
        raise ConfigError(f"{variable}: must be JSON ({error})") from None


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _file(path: Path) -> Layer:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name}: not TOML: {error}; correct {path}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    _anchor(values, path.parent)
    return Layer(path.name, values)


def _anchor(values: dict[str, Any], folder: Path) -> None:
    """Relative paths of the file are relative to the file. Wrong types are left to validation."""

    def at(value: Any) -> Any:
        return str(folder / Path(value).expanduser()) if isinstance(value, str) and value else value

    if "state_dir" in values:
        values["state_dir"] = at(values["state_dir"])
    workers, footprint = values.get("workers"), values.get("footprint")
    if isinstance(workers, dict) and isinstance(workers.get("path"), list):
        workers["path"] = [at(item) for item in workers["path"]]
    if isinstance(footprint, dict) and isinstance(footprint.get("requests"), list):
        for request in footprint["requests"]:
            if isinstance(request, dict) and "body_file" in request:
                request["body_file"] = at(request["body_file"])


def _keys(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return {
        info.alias or name: info
        for name, info in model.model_fields.items()
        if not (isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("internal"))
    }


def _section(info: FieldInfo) -> type[BaseModel] | None:
    kind = info.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def all_keys(schema: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every key in dotted form → its field."""
    keys: dict[str, FieldInfo] = {}
    for name, info in _keys(schema).items():
        if section := _section(info):
            keys |= all_keys(section, f"{prefix}{name}.")
        else:
            keys[prefix + name] = info
    return keys


def _variables(schema: type[BaseModel]) -> list[str]:
    return [PREFIX + key.upper().replace(".", "__") for key in all_keys(schema)]


def _check_keys(schema: type[BaseModel], layer: Layer) -> None:
    known = all_keys(schema)

    def walk(model: type[BaseModel], values: Mapping[str, Any], prefix: str) -> None:
        keys = _keys(model)
        for name, value in values.items():
            if name not in keys:
                guess = nearest(prefix + name, known)
                tails = [key for key in known if key.rpartition(".")[2] == name]
                siblings = [prefix + key for key in keys]
                guess = (tails or [nearest(prefix + name, siblings) or guess])[0]
                hint = f"did you mean {guess}?" if guess else f"known: {', '.join(keys)}"
                shown = _show_unknown(f"{prefix}{name}", value)
                raise ConfigError(
                    f"{layer.label}: {prefix}{name} = {shown}: there is no such key; {hint}"
                )
            if (section := _section(keys[name])) and isinstance(value, Mapping):
                walk(section, value, f"{prefix}{name}.")

    walk(schema, layer.values, "")


def explain(schema: type[BaseModel], error: ValidationError, layers: list[Layer]) -> ConfigError:
    """The first problem as one line: source, key, value, remedy; and how many more there are."""
    problems = error.errors(include_url=False)
    message = _explain_one(schema, problems[0], layers)
    if len(problems) > 1:
        message += f" (and {len(problems) - 1} more)"
    return ConfigError(message)


def _explain_one(schema: type[BaseModel], problem: ErrorDetails, layers: list[Layer]) -> str:
    path, value = problem["loc"], problem["input"]
    names = tuple(str(part) for part in path)
    key = ".".join(names)
    complaint = str(problem.get("ctx", {}).get("error", ""))
    layer = next((layer for layer in layers if path and layer.has(path)), None)
    where = layer.label if layer else "configuration"
    if isinstance(value, dict) and complaint:  # a whole section's, which names its own key
        return f"{where}: {key}{_join(complaint)}" if key else f"{where}: {complaint}"
    if complaint:
        remedy = complaint
    elif problem["type"] == "extra_forbidden":
        return f"{where}: {key} = {_show_unknown(key, value)}: there is no such key"
    elif problem["type"] in ("model_type", "model_attributes_type"):
        remedy = "must be a section (a table of keys)"
    else:
        info = _field(schema, names)
        remedy = f"must be {info.description}" if info and info.description else problem["msg"]
    if layer and names in layer.names:
        return f"{layer.names[names]} = {_show(key, value)}: {remedy}"
    return f"{where}: {key} = {_show(key, value)}: {remedy}"


def _field(schema: type[BaseModel], names: tuple[str, ...]) -> FieldInfo | None:
    """The field of a key, or of the key that an item such as ``aliases.0`` belongs to."""
    fields = all_keys(schema)
    keys = (".".join(names[:depth]) for depth in range(len(names), 0, -1))
    return next((fields[key] for key in keys if key in fields), None)


def _join(text: str) -> str:
    """``count = -1: must be …`` belongs to the key; ``has both …`` is a sentence about it."""
    return f".{text}" if re.match(r"\w+ = ", text) else f" {text}"


def _show(key: str, value: Any) -> str:
    """The value of a known key for an error message; what may be a secret is hidden.

    Hidden are the entries of ``model.environment``, and whatever is named like a secret or names
    one itself (``--api-key abc``).
    """
    if _ENVIRONMENT in key.split(".") or _SECRET.search(key):
        return HIDDEN
    text = json.dumps(value, ensure_ascii=False, default=str)
    if _SECRET.search(text) or (isinstance(value, Mapping) and _ENVIRONMENT in value):
        return HIDDEN
    return text if len(text) <= 80 else text[:77] + "..."


def _show_unknown(key: str, value: Any) -> str:
    """The value of a key that does not exist: only a number, for a text or a table may be an
    entry of a misspelt ``model.environment``."""
    return _show(key, value) if isinstance(value, int | float) else HIDDEN
