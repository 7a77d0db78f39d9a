"""The configuration: one frozen object, validated once, from all sources.

Command line > environment (``GPUFARM_…``) > ``gpufarm.toml`` > defaults. Other processes read it
too, so this module imports neither rich nor typer. ``sources.py`` reads its sources.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from launcher.config import sources
from launcher.config.sizes import MIB, parse_size
from launcher.config.sources import ConfigError

__all__ = ["DEMO_TARGET", "ConfigError", "Settings", "load"]

DEMO_TARGET = "workers.models.voice:Voice"
PLACEHOLDERS = ("port", "host", "device", "gpu", "id")
"""The placeholders of ``model.command`` and ``model.environment``, in braces."""


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def _optional_size(value: object) -> int | None:
    return None if value in ("", None) else parse_size(value)


def _device_name(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _count(value: object) -> object:
    """Validate before pydantic, whose messages for a union lack the remedy."""
    text = value.strip() if isinstance(value, str) else value
    if isinstance(text, str) and text.isdecimal():
        text = int(text)
    if text == "auto" or (isinstance(text, int) and not isinstance(text, bool) and text >= 1):
        return text
    raise ValueError('must be "auto" or a whole number from 1')


def _absolute(value: Path) -> Path:
    return value.expanduser().absolute()


def _url_path(value: str) -> str:
    if not value.startswith("/"):
        raise ValueError('must be a path that begins with "/"')
    return value


def _target(value: str) -> str:
    if value and not re.fullmatch(r"[\w.]+:[\w.]+", value):
        raise ValueError('must be "package.module:Class"')
    return value


Count = Annotated[Literal["auto"] | int, BeforeValidator(_count)]
Whole = Annotated[int, BeforeValidator(_no_bool)]
Seconds = Annotated[float, BeforeValidator(_no_bool)]
Size = Annotated[int, BeforeValidator(parse_size)]
OptionalSize = Annotated[int | None, BeforeValidator(_optional_size)]
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Target = Annotated[str, AfterValidator(_target)]
UrlPath = Annotated[str, AfterValidator(_url_path)]


class _Section(BaseModel):
    """A frozen section without unknown keys. A field's description says what it "must be"."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelSettings(_Section):
    """[model]: what the workers run."""

    name: str = Field(default="", description='a name such as "demo"')
    target: Target = Field(default="", description='"package.module:Class"')
    command: tuple[str, ...] = Field(
        default=(), description='a list such as ["python", "s.py", "{port}"]'
    )
    args: dict[str, Any] = Field(default={}, description="a table of keyword arguments")
    aliases: tuple[str, ...] = Field(default=(), description='a list of names such as ["tts-1"]')
    voice_aliases: dict[str, str] = Field(
        default={}, description='a table of voices such as {alloy = "en_female"}'
    )
    ready_url: UrlPath = Field(default="/", description='a path such as "/health"')
    environment: dict[str, str] = Field(default={}, description="a table of strings")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """Fill in the demo voice where no model is given, and a missing name."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if not data.get("command") and "target" not in data:
            data["target"] = DEMO_TARGET
        target = data.get("target")
        if not data.get("name"):
            if target == DEMO_TARGET or not isinstance(target, str) or ":" not in target:
                data["name"] = "demo" if target == DEMO_TARGET else "model"
            else:
                data["name"] = target.rpartition(":")[2].lower()
        return data

    @model_validator(mode="after")
    def _one_model(self) -> ModelSettings:
        if self.target and self.command:
            raise ValueError("has both target and command; remove one of them")
        if not self.target and not self.command:
            raise ValueError('has neither target ("package.module:Class") nor command; name one')
        texts = [*self.command, *self.environment.values()]
        named = {name for text in texts for name in re.findall(r"\{(\w+)\}", text)}
        for name in sorted(named - set(PLACEHOLDERS)):
            if nearest := sources.nearest(name, PLACEHOLDERS):
                raise ValueError(f"names {{{name}}}, which is unknown; did you mean {{{nearest}}}?")
        if self.command and "port" not in named:
            raise ValueError("has a command without {port}: each worker listens on its own port")
        return self


class WorkersSettings(_Section):
    """[workers]: how many there are, and their limits."""

    count: Count = Field(default="auto", description='"auto" or a whole number from 1')
    max: Whole = Field(default=16, ge=1, le=256, description="a whole number from 1 to 256")
    threads: Whole = Field(default=1, ge=1, le=1024, description="a whole number from 1")
    queue_size: Whole = Field(default=8, ge=0, description="a whole number from 0")
    request_timeout: Seconds = Field(
        default=60.0, gt=0, allow_inf_nan=False, description="a number of seconds above 0"
    )
    load_timeout: Seconds = Field(
        default=600.0, gt=0, allow_inf_nan=False, description="a number of seconds above 0"
    )
    path: tuple[AbsolutePath, ...] = Field(
        default=(), description='a list of folders such as ["models"]'
    )


class ProbeRequest(_Section):
    """An item of footprint.requests: sent to the measurement worker while its memory is sampled.

    POST with ``json`` or ``body_file``, GET with neither.
    """

    model_config = ConfigDict(populate_by_name=True)

    path: UrlPath = Field(description='a path such as "/predict"')
    body: Any = Field(default=None, alias="json", description="the JSON to send")
    body_file: AbsolutePath | None = Field(default=None, description="a file to send")
    content_type: str = Field(default="", description='such as "audio/wav"')

    @model_validator(mode="after")
    def _one_body(self) -> ProbeRequest:
        if self.body is not None and self.body_file is not None:
            raise ValueError("has both json and body_file; remove one of them")
        return self


class FootprintSettings(_Section):
    """[footprint]: the memory of one worker, or how to measure it."""

    bytes: Size = Field(default=0, description='a size such as "7GiB", or 0 to measure')
    requests: tuple[ProbeRequest, ...] = Field(
        default=(), description="a list of {path, json | body_file}"
    )


class BudgetSettings(_Section):
    """[budget]: what the farm may use."""

    devices: tuple[Annotated[str, BeforeValidator(_device_name)], ...] = Field(
        default=(), description='a list of GPU UUIDs, indices or "cpu"'
    )
    memory: OptionalSize = Field(default=None, description='a size such as "20GiB", or ""')
    headroom: OptionalSize = Field(default=None, description='a size such as "1GiB", or ""')
    cores: Whole = Field(default=0, ge=0, description="a whole number, or 0 for what the host has")
    ram: OptionalSize = Field(default=None, description='a size such as "32GiB", or ""')


class BalancerSettings(_Section):
    """[balancer]: nginx, in front of the workers."""

    body_limit: Size = Field(default=64 * MIB, ge=1, description='a size such as "64MiB"')


class LogsSettings(_Section):
    """[logs]: each process's log file."""

    max_bytes: Size = Field(default=10 * MIB, description='a size such as "10MiB"')
    backups: Whole = Field(default=3, ge=0, description="a whole number from 0")
    format: Literal["text", "json"] = Field(default="text", description='"text" or "json"')


class Settings(_Section):
    """The whole configuration. Build it with ``load``, never from parts."""

    host: str = Field(
        default="127.0.0.1", min_length=1, description='an address such as "127.0.0.1"'
    )
    port: Whole = Field(default=8000, ge=1, le=65535, description="a port from 1 to 65535")
    state_dir: AbsolutePath = Field(default_factory=lambda: default_state_dir(os.environ))
    model: ModelSettings = Field(default_factory=ModelSettings)
    workers: WorkersSettings = Field(default_factory=WorkersSettings)
    footprint: FootprintSettings = Field(default_factory=FootprintSettings)
    budget: BudgetSettings = Field(default_factory=BudgetSettings)
    balancer: BalancerSettings = Field(default_factory=BalancerSettings)
    logs: LogsSettings = Field(default_factory=LogsSettings)

    config_file: Path | None = Field(default=None, json_schema_extra={"internal": True})
    """The file that was read; not a key."""
    folder: Path = Field(default_factory=Path.cwd, json_schema_extra={"internal": True})
    """The file's folder, or the working directory at load: first on the workers' import path."""

    @model_validator(mode="after")
    def _can_be_sized(self) -> Settings:
        if self.model.command and not (self.footprint.bytes or self.footprint.requests):
            raise ValueError(
                "model.command needs footprint.requests (sent while its memory is measured) or "
                'footprint.bytes (such as "7GiB")'
            )
        return self

    @property
    def import_path(self) -> tuple[Path, ...]:
        """The folders from which model classes are imported, in order."""
        return (self.folder, *self.workers.path)

    @property
    def planned_from(self) -> tuple[Any, ...]:
        """The part that a plan depends on."""
        workers = self.workers
        counted = (workers.count, workers.max, workers.threads)
        return (self.model, self.footprint, self.budget, counted, self.import_path)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; ``from_json`` restores an equal object in any environment."""
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Settings:
        return cls.model_validate(dict(data))


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """Return ``$XDG_STATE_HOME/gpufarm``, or ``~/.local/state/gpufarm``."""
    base = environ.get("XDG_STATE_HOME")
    if base and Path(base).is_absolute():
        return Path(base) / "gpufarm"
    return Path(environ.get("HOME") or Path.home()) / ".local" / "state" / "gpufarm"


def load(
    config_file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Read every source and validate the result.

    ``overrides`` comes from the command line: nested (``{"workers": {"count": 2}}``) or dotted
    (``{"workers.count": 2}``); None values are ignored. Raises ConfigError, one line.
    """
    environ = os.environ if environ is None else environ
    path = sources.find_file(config_file, environ)
    folder = path.parent if path else Path.cwd()
    layers = sources.read(Settings, path, overrides or {}, environ)
    merged = sources.merge(layers)
    if not merged.get("state_dir"):
        merged["state_dir"] = default_state_dir(environ)
    try:
        return Settings.model_validate({**merged, "config_file": path, "folder": folder})
    except ValidationError as error:
        raise sources.explain(Settings, error, layers) from None
