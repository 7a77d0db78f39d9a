"""Read the configuration's sources; report an error as one line: source, key, value, remedy.

Plain pydantic rather than pydantic-settings, which costs 0.1 s at every start, ignores unknown
variables, and forgets which source a bad value came from.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator, Mapping
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
    # Kubernetes and Docker links set these in every container beside a service named gpufarm.
    r"|GPUFARM_SERVICE_(HOST|PORT(_.*)?)|GPUFARM_PORT_\d+_(TCP|UDP)(_.*)?"
)

HIDDEN = "(hidden)"
"""Replaces a value that may be a secret in error messages."""
_SECRET = re.compile(r"token|secret|passw|key|credential|auth", re.IGNORECASE)
_ENVIRONMENT = "environment"
"""The table whose values are always hidden, at any depth."""
PROBLEMS = {
    "extra_forbidden": "unknown key",
    "model_type": "must be a section (a table of keys)",
    "model_attributes_type": "must be a section (a table of keys)",
}
"""pydantic's kind of error → what is wrong, where the field has no description of it."""


class ConfigError(Exception):
    """The configuration cannot be used. The message is one line; the exit code is 2."""


@dataclass
class Layer:
    """One source's values, nested as in the file."""

    label: str
    values: dict[str, Any]
    names: dict[tuple[str, ...], str] = field(default_factory=dict)
    """Key path → the source's own name for it, where that is not the dotted key."""

    def has(self, path: tuple[str | int, ...]) -> bool:
        node: Any = self.values
        for part in path:
            try:
                node = node[part]
            except (KeyError, IndexError, TypeError):
                return False
        return True


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name closest to ``name``; empty when none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else ""


def find_file(config_file: Path | None, environ: Mapping[str, str]) -> Path | None:
    """Find ``--config``, else ``$GPUFARM_CONFIG``, else ``./gpufarm.toml`` where it exists."""
    named = config_file or environ.get("GPUFARM_CONFIG") or None
    path = Path(named) if named else Path(FILE_NAME)
    path = path.expanduser().absolute()
    if path.is_file():
        return path
    if named:
        origin = "--config" if config_file else "GPUFARM_CONFIG"
        kind = "a folder, not a file" if path.is_dir() else "no such file"
        raise _config_error(origin, str(named), kind, f"name an existing {FILE_NAME}")
    return None


def read(
    schema: type[BaseModel],
    path: Path | None,
    overrides: Mapping[str, Any],
    environ: Mapping[str, str],
) -> list[Layer]:
    """Read the layers, strongest first. Raises ConfigError (unknown key, unreadable file)."""
    layers = [_command_line(overrides), _environment(schema, environ)]
    if path:
        layers.append(_file(path))
    for layer in layers:
        _check_keys(schema, layer)
    return layers


def merge(layers: list[Layer]) -> dict[str, Any]:
    """Merge key by key; the stronger of model.target and model.command drops the other."""
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
    """Read variables such as ``GPUFARM_WORKERS__COUNT=2``.

    An empty variable counts as unset; tables keep the case of their keys.
    """
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
            # Its value may be a token under a misspelt name: it is left out.
            raise _config_error(variable, "", "unknown setting", hint)
        node = layer.values
        for parent in path[:-1]:
            node = node.setdefault(parent, {})
        node[path[-1]] = _parse(variable, text, info, path)
        layer.names[tuple(path)] = variable
    return layer


def _resolve(schema: type[BaseModel], parts: list[str]) -> tuple[list[str], FieldInfo | None]:
    """Resolve a variable to its key path and field; None for an unknown one."""
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
    """Parse a variable as the type of its field."""
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
                raise _config_error(variable, "", f"must be a command line ({error})") from None
        return [item.strip() for item in text.split(",") if item.strip()]
    try:
        return json.loads(text)
    except ValueError as error:  # its message has the position, not the text
        raise _config_error(variable, "", f"must be JSON ({error})") from None


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _file(path: Path) -> Layer:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _config_error(path.name, "", f"not TOML: {error}", f"correct {path}") from None
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
        raise _config_error(str(path), "", reason, "correct its permissions") from None
    _resolve_paths(values, path.parent)
    return Layer(path.name, values)


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    """Resolve relative paths against the file's folder. Wrong types are left to validation."""

    def absolute(value: Any) -> Any:
        return str(folder / Path(value).expanduser()) if isinstance(value, str) and value else value

    if "state_dir" in values:
        values["state_dir"] = absolute(values["state_dir"])
    workers, footprint = values.get("workers"), values.get("footprint")
    if isinstance(workers, dict) and isinstance(workers.get("path"), list):
        workers["path"] = [absolute(item) for item in workers["path"]]
    if isinstance(footprint, dict) and isinstance(footprint.get("requests"), list):
        for request in footprint["requests"]:
            if isinstance(request, dict) and "body_file" in request:
                request["body_file"] = absolute(request["body_file"])


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
    """Map every key in dotted form to its field."""
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
    """Raise ConfigError for a key that the schema lacks, with the nearest one that it has."""
    known = all_keys(schema)
    sections = [name for name, info in _keys(schema).items() if _section(info)]
    for key, value in _entries(layer.values, sections):
        if key in known or key in sections:
            continue
        parent, _, name = key.rpartition(".")
        siblings = [one for one in (*known, *sections) if one.rpartition(".")[0] == parent]
        same_name = [one for one in known if one.rpartition(".")[2] == name]
        guess = (same_name or [nearest(key, siblings) or nearest(key, known)])[0]
        names = ", ".join(one.removeprefix(f"{parent}.") for one in siblings)
        remedy = f"did you mean {guess}?" if guess else f"known: {names}"
        text = _format_unknown(key, value)
        raise _config_error(f"{layer.label}: {key}", text, PROBLEMS["extra_forbidden"], remedy)


def _entries(
    values: Mapping[str, Any], sections: list[str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and their values; tables other than sections are values."""
    for name, value in values.items():
        if prefix + name in sections and isinstance(value, Mapping):
            yield from _entries(value, sections, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def explain(schema: type[BaseModel], error: ValidationError, layers: list[Layer]) -> ConfigError:
    """Format the first problem as one line, with the number of the others."""
    problems = error.errors(include_url=False)
    first = _explain_problem(schema, problems[0], layers)
    more = len(problems) - 1
    return ConfigError(f"{first} (and {more} more)") if more else first


def _explain_problem(
    schema: type[BaseModel], problem: ErrorDetails, layers: list[Layer]
) -> ConfigError:
    path, value, kind = problem["loc"], problem["input"], problem["type"]
    names = tuple(str(part) for part in path)
    key = ".".join(names)
    layer = next((layer for layer in layers if path and layer.has(path)), None)
    label = layer.label if layer else "configuration"
    message = str(problem.get("ctx", {}).get("error", ""))  # of a validator of ours
    if message and isinstance(value, dict):  # about a whole section
        return ConfigError(f"{label}: {' '.join(filter(None, (key, message)))}")
    place = layer.names.get(names) if layer else None
    text = _format_unknown(key, value) if kind == "extra_forbidden" else _format(key, value)
    wrong = message or PROBLEMS.get(kind) or _requirement(schema, names) or problem["msg"]
    return _config_error(place or f"{label}: {key}", text, wrong)


def _config_error(place: str, value: str, problem: str, remedy: str = "") -> ConfigError:
    """Format ``PLACE = VALUE: problem; remedy``; a value that is empty is left out."""
    what = f"{place} = {value}" if value else place
    return ConfigError("; ".join(filter(None, (f"{what}: {problem}", remedy))))


def _requirement(schema: type[BaseModel], names: tuple[str, ...]) -> str:
    """Format what a key "must be"; an item such as ``aliases.0`` is described by its list."""
    fields = all_keys(schema)
    keys = (".".join(names[:depth]) for depth in range(len(names), 0, -1))
    info = next((fields[key] for key in keys if key in fields), None)
    return f"must be {info.description}" if info and info.description else ""


def _format(key: str, value: Any) -> str:
    """Format the value of a known key for an error message; hide what may be a secret.

    Hidden are the entries of ``model.environment``, and whatever is named like a secret or names
    one itself (``--api-key abc``).
    """
    if _ENVIRONMENT in key.split(".") or _SECRET.search(key):
        return HIDDEN
    text = json.dumps(value, ensure_ascii=False, default=str)
    if _SECRET.search(text) or (isinstance(value, Mapping) and _ENVIRONMENT in value):
        return HIDDEN
    return text if len(text) <= 80 else text[:77] + "..."


def _format_unknown(key: str, value: Any) -> str:
    """Format the value of an unknown key: only a number, because a string or a table may belong
    to a misspelt ``model.environment``."""
    return _format(key, value) if isinstance(value, int | float) else HIDDEN
