"""Rendering, read back: by nginx itself where it says more than the text does."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from balancer import nginx
from balancer.configuration import (
    BalancerConfig,
    ErrorResponse,
    Upstream,
    address,
    error_responses,
    listening,
    open_file_limit,
    render,
    write,
)


def config(prefix: Path, **changes: object) -> BalancerConfig:
    base = BalancerConfig(
        host="127.0.0.1",
        port=8000,
        upstreams=(Upstream("w1", 20001), Upstream("w2", 20002), Upstream("w10", 20010)),
        admin_socket=Path("/run/a farm/admin.sock"),
        prefix=prefix,
        version=(1, 22, 1),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def test_every_slot_is_listed_once_with_max_fails_0(tmp_path: Path) -> None:
    text = render(config(tmp_path))
    workers = text[text.index("upstream workers") : text.index("upstream status")]
    assert re.findall(r"server 127\.0\.0\.1:(\d+) max_fails=0;", workers) == [
        "20001",
        "20002",
        "20010",
    ]
    assert "least_conn" in workers
    assert "zone" in workers
    assert "non_idempotent" in text
    assert "next_upstream_tries 0;" in text


def test_the_controller_is_asked_for_the_farms_state_and_workers_only_without_it(
    tmp_path: Path,
) -> None:
    status = render(config(tmp_path)).split("upstream status")[1].split("}")[0]
    assert 'server "unix:/run/a farm/admin.sock" max_fails=0;' in status
    assert status.count("backup") == 3
    alone = render(config(tmp_path, own_workers=False)).split("upstream status")[1]
    assert "backup" not in alone.split("}")[0]


@pytest.mark.parametrize(
    ("version", "knows"), [((1, 22, 1), False), ((1, 27, 3), False), ((1, 27, 4), True)]
)
def test_a_directive_is_used_only_where_nginx_knows_it(
    tmp_path: Path, version: tuple[int, ...], knows: bool
) -> None:
    assert ("keepalive_min_timeout" in render(config(tmp_path, version=version))) is knows


def test_timeouts_follow_the_request_timeout(tmp_path: Path) -> None:
    text = render(config(tmp_path, request_timeout=300.0))
    assert "proxy_read_timeout 305s;" in text
    assert "worker_shutdown_timeout 305s;" in text


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "localhost", "*"])
def test_nginx_accepts_it(tmp_path: Path, host: str, own: bool) -> None:
    program = nginx.find()
    version = nginx.version(program)
    prefix = tmp_path / "with a blank, a ; a $ and a ' in it"
    prefix.mkdir()
    wanted = config(
        prefix,
        host=host,
        port=28765,
        version=version,
        own_workers=own,
        open_files=open_file_limit(),
    )
    assert write(wanted)
    nginx.test(program, version, prefix)
    assert not write(wanted), "an unchanged configuration is not written again"
    assert write(replace(wanted, request_timeout=7.0))


def test_a_refused_file_is_one_line(tmp_path: Path) -> None:
    program = nginx.find()
    version = nginx.version(program)
    write(config(tmp_path, version=version))
    (tmp_path / "nginx.conf").write_text("no_such_directive on;\nevents {}\n")
    with pytest.raises(nginx.BalancerError, match="no_such_directive") as caught:
        nginx.test(program, version, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_rejected_file_does_not_replace_the_current_one(tmp_path: Path) -> None:
    """A killed nginx comes back from the file that is there, so that one has to be sound."""
    program = nginx.find()
    version = nginx.version(program)
    good = config(tmp_path, version=version)
    assert write(good, lambda name: nginx.test(program, version, tmp_path, name))
    before = (tmp_path / "nginx.conf").read_text()
    with pytest.raises(nginx.BalancerError, match="nowhere"):
        write(
            replace(good, host="nowhere.invalid"),
            lambda name: nginx.test(program, version, tmp_path, name),
        )
    assert (tmp_path / "nginx.conf").read_text() == before
    assert [path.name for path in tmp_path.glob("nginx.conf*")] == ["nginx.conf"]


def test_errors_are_json_in_openais_shape(tmp_path: Path) -> None:
    for status, answer in error_responses(config(tmp_path)).items():
        error = json.loads(answer.body[1:-1])["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert answer.status == int(status)
        assert (answer.retry_after is not None) == (status in ("429", "503"))


def test_quotes_in_an_answer_reach_the_caller_and_variables_are_refused() -> None:
    quoted = ErrorResponse(400, 'it\'s a "test"', "t", "c").body
    unquoted = quoted[1:-1].replace("\\'", "'").replace("\\\\", "\\")
    assert json.loads(unquoted)["error"]["message"] == 'it\'s a "test"'
    with pytest.raises(ValueError, match="\\$"):
        _ = ErrorResponse(400, "costs $5", "t", "c").body


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "*", "localhost"])
def test_the_address_is_read_back(tmp_path: Path, host: str) -> None:
    write(config(tmp_path, host=host, port=28000))
    assert listening(tmp_path) == (host, 28000)


def test_addresses() -> None:
    assert address("127.0.0.1", 80) == "127.0.0.1:80"
    assert address("::1", 80) == "[::1]:80"
    assert address("[::1]", 80) == "[::1]:80"
    for bad in ("", "a b", "a;b", "127.0.0.1/8", "a{"):
        with pytest.raises(ValueError, match="host"):
            address(bad, 80)
