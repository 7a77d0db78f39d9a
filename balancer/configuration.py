"""nginx's configuration: a frozen description, and its rendering as nginx.conf."""

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
"""While this file exists, nginx closes each connection after its response."""
ACCESS_LOG = "logs/nginx-access.log"
ERROR_LOG = "logs/nginx-error.log"
TEMPORARY = "nginx-tmp"
FOLDERS = ("run", "logs", TEMPORARY)
"""Folders below nginx's prefix. Relative paths need no quoting in the file."""

UPSTREAM_KEEPALIVE_SECONDS = 60
"""Seconds that nginx keeps an idle connection to a worker. A worker must keep it for longer."""

STATUS_PATHS = ("/readyz", "/health", "/metrics")
INTERNAL = "/.gpufarm/"
CONTROL_CHARACTERS_END = 32


@dataclass(frozen=True)
class Upstream:
    """One worker's port on 127.0.0.1, and its id in headers and logs."""

    id: str
    port: int


@dataclass(frozen=True)
class BalancerConfig:
    """The values that nginx.conf is rendered from."""

    host: str
    port: int
    upstreams: tuple[Upstream, ...]
    """Every slot, also empty ones: a port without a listener costs one refused connection."""
    admin_socket: Path
    """The Unix socket that serves the farm's /readyz, /health and /metrics."""
    prefix: Path
    """nginx's own directory; it writes nowhere else."""
    version: tuple[int, ...]
    """nginx's version, such as (1, 22, 1): it decides which directives can be used."""
    body_limit: int = 64 * 2**20
    """Maximum size of a request body in bytes."""
    response_file_limit: int = 64 * 2**20
    """Bytes of one response that nginx buffers in a file for a slow client, so that its worker is
    free: 35 minutes of 16 kHz speech. On a full disk such a response is truncated; the client sees
    that by Content-Length or by the missing last chunk."""
    request_timeout: float = 60.0
    """Seconds: the worker's own timeout. nginx waits a little longer, so the worker responds."""
    processes: int = 2
    open_files: int = 4096
    """Limit of open files of one nginx process; it may use half of them for connections."""
    as_root: bool = False
    """Whether nginx starts as root: its processes stay root, to be able to enter the prefix."""
    own_workers: bool = True
    """False for external servers: their responses are streamed without `X-Accel-Buffering: no`, no
    idle connections are kept, 429 and 503 go on to the next server, their X-Accel headers are
    ignored, and they do not serve the status paths."""
    grace: float = 5.0
    """Seconds after the request timeout in which a worker may still respond that it has passed."""
    tries: int = 0
    """Maximum upstreams tried for one request; 0 tries every upstream once."""

    @property
    def read_timeout(self) -> float:
        return self.request_timeout + self.grace


@dataclass(frozen=True)
class ErrorResponse:
    """A response that nginx makes itself, in OpenAI's error format."""

    status: int
    message: str
    type: str
    code: str
    retry_after: int | None = None
    """Seconds."""

    @property
    def body(self) -> str:
        """The JSON text in single quotes for nginx, which would read `$` as a variable."""
        error = {"message": self.message, "type": self.type, "param": None, "code": self.code}
        text = json.dumps({"error": error})
        if "$" in text:
            raise ValueError(f"a response of nginx cannot contain '$': {text}")
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def error_responses(config: BalancerConfig) -> dict[str, ErrorResponse]:
    """Return the error responses by the name of nginx's internal location."""
    invalid, server = "invalid_request_error", "server_error"
    limit = f"{config.body_limit / 2**20:g} MiB"
    responses = [
        ErrorResponse(
            400,
            "The request is not valid HTTP: its line or a header is too long or has characters "
            "that HTTP does not allow; percent-encode non-ASCII characters of the URL.",
            invalid,
            "bad_request",
        ),
        ErrorResponse(404, "Not found.", invalid, "not_found"),
        ErrorResponse(405, "Method not allowed.", invalid, "method_not_allowed"),
        ErrorResponse(
            413,
            f"The request body is larger than {limit} (balancer.body_limit).",
            invalid,
            "body_too_large",
        ),
        ErrorResponse(414, "The URL of the request is too long.", invalid, "uri_too_long"),
        ErrorResponse(
            429, "Every worker is busy and its queue is full.", "rate_limit_error", "queue_full", 1
        ),
        ErrorResponse(500, "The balancer could not handle the request.", server, "internal_error"),
        ErrorResponse(501, "The transfer encoding is not supported.", invalid, "not_implemented"),
        ErrorResponse(503, "No worker is ready.", server, "no_worker", 2),
        ErrorResponse(
            504,
            f"No response within {config.read_timeout:g} s (workers.request_timeout).",
            "timeout_error",
            "timeout",
        ),
        ErrorResponse(505, "Only HTTP/1.0 and HTTP/1.1 are supported.", invalid, "http_version"),
    ]
    return {str(response.status): response for response in responses}


def address(host: str, port: int) -> str:
    """Return ``host:port`` for nginx's ``listen``, IPv6 in brackets.

    Raises ValueError for an invalid host, so that nothing else can get into the file.
    """
    bare = host.strip("[]")
    if not bare or any(not (c.isalnum() or c in ".:-_*%") for c in bare):
        raise ValueError(f"host is not an address: {host!r}; set one such as 127.0.0.1 or ::")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def unix_address(path: Path) -> str:
    """Return a Unix socket for nginx's ``server``. Raises ValueError for an unreadable path."""
    if re.search(r"[\x00-\x1f;{}$\"'\\#:]", str(path)):
        raise ValueError(f"nginx cannot read the socket's path: {path}; choose another state_dir")
    return f'"unix:{path}"'


def listening(prefix: Path) -> tuple[str, int]:
    """Return host and port of the configuration below ``prefix``. Raises ValueError without one."""
    match = re.search(r"^\s*listen (\S+):(\d+) ", (prefix / CONF).read_text(), re.MULTILINE)
    if match is None:
        raise ValueError(f"{prefix / CONF} has no listen directive; run `gpufarm up`")
    return match[1].strip("[]"), int(match[2])


def render(config: BalancerConfig) -> str:
    """Return the text of nginx.conf."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("balancer"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - not HTML
    )
    return environment.get_template("nginx.conf.j2").render(
        config=config,
        listen=address(config.host, config.port),
        admin=unix_address(config.admin_socket),
        error_responses=error_responses(config),
        status_paths=STATUS_PATHS,
        internal=INTERNAL,
        upstream_keepalive=UPSTREAM_KEEPALIVE_SECONDS,
        # Idle client connections that a reload closes are the only way to lose requests there.
        keeps_idle_at_reload=config.version >= (1, 27, 4),
        connections=max(64, config.open_files // 2),
        pid=PID,
        closing=CLOSING,
        access_log=ACCESS_LOG,
        error_log=ERROR_LOG,
        temporary=TEMPORARY,
    )


def open_file_limit() -> int:
    """Return the open files that one nginx process may have: the hard limit, at most 16384."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 16384 if hard == resource.RLIM_INFINITY else min(hard, 16384)


def write(
    config: BalancerConfig,
    check: Callable[[str], None] = lambda name: None,
    *,
    check_only: bool = False,
) -> bool:
    """Write nginx.conf and the folders below the prefix. Returns whether the file changed, or, with
    ``check_only``, would change.

    The file is replaced atomically: a running nginx reads the old or the new one. ``check`` gets
    the new file's name in the prefix first. If it raises, the new file is removed and the old one
    stays, because a killed nginx restarts from it.
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
        if changed and not check_only:
            fresh.replace(path)
        return changed
    finally:
        fresh.unlink(missing_ok=True)
