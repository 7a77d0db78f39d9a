"""Read a worker's spec, the JSON file that the launcher writes, and validate it key by key."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from workers.errors import LoadError

DEFAULT_NAME = "default"
"""The name that always stands for the model, and for its first voice."""


@dataclass(frozen=True)
class Spec:
    """Sizes are in bytes, times in seconds, lengths of input in characters."""

    target: str
    args: dict[str, Any] = field(default_factory=dict)
    name: str = "model"
    aliases: tuple[str, ...] = ()
    voice_aliases: dict[str, str] = field(default_factory=dict)
    """Alias of a voice → one of the model's voices."""
    path: tuple[Path, ...] = ()
    queue_size: int = 8
    request_timeout: float = 60.0
    body_limit: int = 64 * 1024 * 1024
    input_limit: int = 16384
    """OpenAI's is 4,096; the models here may take more at once."""
    cache_dir: Path | None = None
    log_format: str = "text"
    """"text" or "json" """
    created: int = 0
    """Unix time for /v1/models, the same on every worker of a farm; by default the time of the spec
    file."""

    @property
    def names(self) -> list[str]:
        """All names that requests may use for the model, its own first."""
        return list(dict.fromkeys((self.name, *self.aliases, DEFAULT_NAME)))


_MODEL_KEYS = ("target", "args", "name", "aliases", "voice_aliases")
_KEYS = (
    *("model", "path", "queue_size", "request_timeout", "body_limit", "input_limit", "cache_dir"),
    *("log_format", "created"),
)
_LOG_FORMATS = ("text", "json")


def read_spec(file: Path) -> Spec:
    """Read a spec. Raises LoadError: one line with the file, the key, the value and the remedy."""
    try:
        text = file.read_text(encoding="utf-8")
        written = int(file.stat().st_mtime)
    except OSError as error:
        raise LoadError(
            f"spec {file}: {error.strerror}; give --spec a readable file",
            permanent=isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError),
        ) from None
    except UnicodeDecodeError:
        raise LoadError(f"spec {file}: not UTF-8; give --spec a JSON file") from None
    try:
        spec = parse_spec(json.loads(text))
    except (json.JSONDecodeError, RecursionError) as error:
        raise LoadError(f"spec {file}: not JSON ({error}); correct it there") from None
    except LoadError as error:
        raise LoadError(f"spec {file}: {error}") from None
    return spec if spec.created else replace(spec, created=written)


def parse_spec(document: Any) -> Spec:
    """Validate a parsed spec. Raises LoadError with the key."""
    top = _table(document, "the document", _KEYS)
    model = _table(top.get("model", {}), "model", _MODEL_KEYS)
    if "target" not in model:
        raise LoadError('model.target is missing; name a class, as "package.module:Class"')
    cache = top.get("cache_dir")
    return Spec(
        target=_string(model["target"], "model.target"),
        args=_arguments(model.get("args", {})),
        name=_string(model.get("name", Spec.name), "model.name"),
        aliases=tuple(_strings(model.get("aliases", []), "model.aliases")),
        voice_aliases=_string_table(model.get("voice_aliases", {}), "model.voice_aliases"),
        path=tuple(Path(folder) for folder in _strings(top.get("path", []), "path")),
        queue_size=_integer(top.get("queue_size", Spec.queue_size), "queue_size", minimum=0),
        request_timeout=_seconds(
            top.get("request_timeout", Spec.request_timeout), "request_timeout"
        ),
        body_limit=_integer(top.get("body_limit", Spec.body_limit), "body_limit", minimum=1),
        input_limit=_integer(top.get("input_limit", Spec.input_limit), "input_limit", minimum=1),
        cache_dir=None if cache is None else Path(_string(cache, "cache_dir")),
        log_format=_log_format(top.get("log_format", Spec.log_format)),
        created=_integer(top.get("created", Spec.created), "created", minimum=0),
    )


def _table(value: Any, where: str, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise LoadError(f"{where} must be a JSON object, got {_formatted(value)}")
    for key in value:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f'did you mean "{near[0]}"?' if near else f"known keys: {', '.join(keys)}"
            raise LoadError(f'unknown key "{key}" in {where}; {hint}')
    return value


def _arguments(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise LoadError(
            f"model.args must be an object of keyword arguments, got {_formatted(value)}"
        )
    return value


def _string(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise LoadError(f"{key} must be a non-empty string, got {_formatted(value)}")
    return value


def _strings(value: Any, key: str) -> list[str]:
    if not isinstance(value, list):
        raise LoadError(f"{key} must be a list of strings, got {_formatted(value)}")
    return [_string(item, f"{key}[{index}]") for index, item in enumerate(value)]


def _string_table(value: Any, key: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise LoadError(f"{key} must be an object of strings, got {_formatted(value)}")
    return {name: _string(item, f"{key}.{name}") for name, item in value.items()}


def _integer(value: Any, key: str, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise LoadError(f"{key} must be an integer of at least {minimum}, got {_formatted(value)}")
    return value


def _seconds(value: Any, key: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise LoadError(f"{key} must be a positive number of seconds, got {_formatted(value)}")
    return float(value)


def _log_format(value: Any) -> str:
    if value not in _LOG_FORMATS:
        raise LoadError(f'log_format must be "text" or "json", got {_formatted(value)}')
    return str(value)


def _formatted(value: Any) -> str:
    return json.dumps(value)[:80]
