"""What nginx is told: a frozen description, and its rendering as an nginx.conf."""

from __future__ import annotations

import json
import os
import re
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jinja2

CONF = "nginx.conf"
PID = "run/nginx.pid"
CLOSING = "run/closing"
"""While this file exists, nginx ends each connection after its answer."""
ACCESS_LOG = "logs/nginx-access.log"
ERROR_LOG = "logs/nginx-error.log"
TEMPORARY = "nginx-tmp"
FOLDERS = ("run", "logs", TEMPORARY)
"""Everything lies below nginx's prefix, so that no path has to be quoted inside the file."""

UPSTREAM_KEEPALIVE_SECONDS = 60
"""How long nginx keeps an idle connection to a worker. A worker must keep it for longer."""

STATUS_PATHS = ("/readyz", "/health", "/metrics")
INTERNAL = "/.gpufarm/"
CONTROL_CHARACTERS_END = 32


@dataclass(frozen=True)
class Upstream:
    """One worker's address on 127.0.0.1, and the id it is known by in headers and logs."""

    id: str
    port: int


@dataclass(frozen=True)
class BalancerConfig:
    """Everything nginx is rendered from."""

    host: str
    port: int
    upstreams: tuple[Upstream, ...]
    """Every slot, also the empty ones: a port on which nobody listens costs one refused connect."""
    admin_socket: Path
    """The Unix socket where the whole farm's /readyz, /health and /metrics are answered."""
    prefix: Path
    """nginx's own directory; it writes nowhere else."""
    version: tuple[int, ...]
    """nginx's version, which decides what it understands: (1, 22, 1)."""
    body_limit: int = 64 * 2**20
    """Bytes of the largest request body."""
    response_file_limit: int = 64 * 2**20
    """Bytes of one answer that nginx holds in a file for a slow reader, so that its worker is free:
    35 minutes of 16 kHz speech. Where the disk is full such an answer is cut, which its reader sees
    by Content-Length or by the missing last chunk."""
    request_timeout: float = 60.0
    """Seconds: the worker's own deadline. nginx waits a little longer, so the worker answers."""
    processes: int = 2
    open_files: int = 4096
    """Limit of open files of one nginx process; half of it is what it may hold in connections."""
    as_root: bool = False
    """nginx started as root would give its processes to `nobody`, who may not enter the prefix."""
    own_workers: bool = True
    """False for external servers: an answer of theirs is streamed without `X-Accel-Buffering: no`,
    an idle connection may block all others, their 429 and 503 are the refusals, headers of theirs
    steer nothing in nginx, and the status paths are not asked of them."""
    grace: float = 5.0
    """Seconds beyond the request timeout in which a worker may still answer that it has passed."""
    tries: int = 0
    """Attempts of one request over the upstreams; 0 is every upstream once."""

    @property
    def read_timeout(self) -> float:
        return self.request_timeout + self.grace


@dataclass(frozen=True)
class ErrorResponse:
    """An answer that nginx makes itself, in the shape of OpenAI's errors."""

    status: int
    message: str
    type: str
    code: str
    retry_after: int | None = None
    """Seconds."""

    @property
    def body(self) -> str:
        """The JSON text, quoted for nginx (single quotes; nginx would read `$` as a variable)."""
        error = {"message": self.message, "type": self.type, "param": None, "code": self.code}
        text = json.dumps({"error": error})
        if "$" in text:
            raise ValueError(f"an nginx answer cannot contain '$': {text}")
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def error_responses(config: BalancerConfig) -> dict[str, ErrorResponse]:
    """The answers by the name of nginx's internal location."""
    invalid, server = "invalid_request_error", "server_error"
    limit = f"{config.body_limit / 2**20:g} MiB"
    answers = [
        ErrorResponse(
            400,
            "The request is not valid HTTP: its line or a header is too long or holds characters "
            "that HTTP does not allow; percent-encode what is not ASCII in the address.",
            invalid,
            "bad_request",
        ),
        ErrorResponse(404, "There is nothing at this path.", invalid, "not_found"),
        ErrorResponse(405, "This method is not allowed here.", invalid, "method_not_allowed"),
        ErrorResponse(
            413,
            f"The body is larger than {limit} (balancer.body_limit).",
            invalid,
            "body_too_large",
        ),
        ErrorResponse(414, "The address of the request is too long.", invalid, "uri_too_long"),
        ErrorResponse(
            429, "Every worker is busy and its line is full.", "rate_limit_error", "queue_full", 1
        ),
        ErrorResponse(500, "The balancer could not handle the request.", server, "internal_error"),
        ErrorResponse(501, "This transfer encoding is not supported.", invalid, "not_implemented"),
        ErrorResponse(503, "No worker is ready.", server, "no_worker", 2),
        ErrorResponse(
            504,
            f"No answer came within {config.read_timeout:g} s (workers.request_timeout).",
            "timeout_error",
            "timeout",
        ),
        ErrorResponse(505, "Only HTTP/1.0 and HTTP/1.1 are spoken here.", invalid, "http_version"),
    ]
    return {str(answer.status): answer for answer in answers}


def address(host: str, port: int) -> str:
    """``host:port`` as nginx's listen wants it, IPv6 in brackets.

    Raises ValueError for what cannot be a host, so that nothing else gets into the file.
    """
    bare = host.strip("[]")
    if not bare or any(not (c.isalnum() or c in ".:-_*%") for c in bare):
        raise ValueError(f"host = {host!r} is not an address: write one such as 127.0.0.1 or ::")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def unix_address(path: Path) -> str:
    """A Unix socket as nginx's `server` wants it. Raises ValueError for what it cannot read."""
    if re.search(r"[\x00-\x1f;{}$\"'\\#:]", str(path)):
        raise ValueError(f"{path}: nginx cannot read a socket's path with such characters")
    return f'"unix:{path}"'


def listening(prefix: Path) -> tuple[str, int]:
    """Host and port of the configuration that was written below ``prefix``."""
    match = re.search(r"^\s*listen (\S+):(\d+) ", (prefix / CONF).read_text(), re.MULTILINE)
    if match is None:
        raise ValueError(f"{prefix / CONF} names no port to listen on")
    return match[1].strip("[]"), int(match[2])


def render(config: BalancerConfig) -> str:
    """The text of nginx.conf."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("balancer"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - this is no HTML
    )
    return environment.get_template("nginx.conf.j2").render(
        config=config,
        listen=address(config.host, config.port),
        admin=unix_address(config.admin_socket),
        error_responses=error_responses(config),
        status_paths=STATUS_PATHS,
        internal=INTERNAL,
        upstream_keepalive=UPSTREAM_KEEPALIVE_SECONDS,
        # An idle client connection that ends with a reload is the one way to lose requests there.
        keeps_idle_at_reload=config.version >= (1, 27, 4),
        connections=max(64, config.open_files // 2),
        pid=PID,
        closing=CLOSING,
        access_log=ACCESS_LOG,
        error_log=ERROR_LOG,
        temporary=TEMPORARY,
    )


def open_file_limit() -> int:
    """How many files one nginx process may have open here: the hard limit, at most 16384."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 16384 if hard == resource.RLIM_INFINITY else min(hard, 16384)


def write(config: BalancerConfig, check: Callable[[str], None] = lambda name: None) -> bool:
    """Write nginx.conf and the folders below the prefix. Returns whether the file changed.

    The file is replaced in one step: a running nginx reads the old or the new one. Before that
    ``check`` is given the new one's name in the prefix: what it refuses by raising is removed
    again, for a killed nginx comes back from the file that is there.
    """
    text = render(config)
    for folder in FOLDERS:
        (config.prefix / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    path = config.prefix / CONF
    fresh = path.with_name(f"{CONF}.{os.getpid()}")
    try:
        fresh.write_text(text)
        check(fresh.name)
        changed = not path.exists() or path.read_text() != text
        if changed:
            fresh.replace(path)
        return changed
    finally:
        fresh.unlink(missing_ok=True)
