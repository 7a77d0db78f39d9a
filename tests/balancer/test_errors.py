"""What is not a proper request: every answer to it is JSON, whether nginx makes it or not.

The server behind nginx is uvicorn, as the workers are: what nginx passes on, its parser may refuse
in plain text. Two things stay with nginx's own form: HTTP/0.9, which has no header to say that it
is JSON, and a caller that is too slow (408), whose connection is closed without an answer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.balancer.harness import BalancerHarness, make_balancer, raw
from tests.waiting import listens, until

APP = """
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

async def tell(request):
    return JSONResponse({"method": request.method, "path": request.url.path})

methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
app = Starlette(routes=[Route("/{path:path}", tell, methods=methods)])
"""
HOST = b"Host: x\r\n"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BalancerHarness]:
    folder = tmp_path_factory.mktemp("nginx")
    (folder / "telling_app.py").write_text(APP)
    made = make_balancer(folder, slots=1)
    port = made.ports["w1"]
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(folder), "telling_app:app"]
    command += ["--port", str(port), "--http", "httptools", "--log-level", "critical"]
    server = subprocess.Popen(command)
    try:
        until(lambda: listens(port), "uvicorn listens")
        made.start()
        yield made
    finally:
        made.stop()
        server.terminate()
        server.wait(20)


def request(line: bytes, *headers: bytes, host: bytes = HOST) -> bytes:
    return line + b"\r\n" + host + b"".join(header + b"\r\n" for header in headers) + b"\r\n"


def get(*headers: bytes, host: bytes = HOST) -> bytes:
    return request(b"GET /x HTTP/1.1", *headers, host=host)


def post(*headers: bytes, body: bytes = b"") -> bytes:
    return request(b"POST /x HTTP/1.1", *headers) + body


REFUSED = {
    "a control character in the address": (request(b"GET /a\x01b HTTP/1.1"), 400),
    "DEL in the address": (request(b"GET /a\x7fb HTTP/1.1"), 400),
    "NUL in the address": (request(b"GET /a\0b HTTP/1.1"), 400),
    "a tab in the address": (request(b"GET /a\tb HTTP/1.1"), 400),
    "a blank in the address": (request(b"GET /a b HTTP/1.1"), 400),
    "raw UTF-8 in the path": (request(b"GET /\xc3\xa4 HTTP/1.1"), 400),
    "raw UTF-8 in the query": (request(b"GET /a?x=\xc3\xa4 HTTP/1.1"), 400),
    "raw UTF-8 in an absolute address": (request(b"GET http://x/\xc3\xa4 HTTP/1.1"), 400),
    "raw UTF-8 in a status path's query": (request(b"GET /health?\xc3\xa4 HTTP/1.1"), 400),
    "a percent sign without digits": (request(b"GET /%zz HTTP/1.1"), 400),
    "a percent-encoded NUL": (request(b"GET /%00 HTTP/1.1"), 400),
    "a path above the root": (request(b"GET /../x HTTP/1.1"), 400),
    "an unknown method": (request(b"FOO /x HTTP/1.1"), 405),
    "an unknown method with an underscore": (request(b"FOO_BAR /x HTTP/1.1"), 405),
    "a very long method": (request(b"A" * 300 + b" /x HTTP/1.1"), 405),
    "a method of WebDAV": (request(b"PROPFIND /x HTTP/1.1"), 405),
    "TRACE": (request(b"TRACE /x HTTP/1.1"), 405),
    "an unknown method at a status path": (request(b"FOO /health HTTP/1.1"), 405),
    "CONNECT": (request(b"CONNECT x:80 HTTP/1.1"), 400),
    "a method in small letters": (request(b"get /x HTTP/1.1"), 400),
    "a method with other characters": (request(b"F@O /x HTTP/1.1"), 400),
    "a * for an address": (request(b"OPTIONS * HTTP/1.1"), 400),
    "NUL in a header": (get(b"X-A: a\0b"), 400),
    "a control character in a header's name": (get(b"X\x01A: a"), 400),
    "a blank in a header's name": (get(b"X A: a"), 400),
    "a folded header": (get(b"X-A: a", b" b"), 400),
    "no host": (get(host=b""), 400),
    "two hosts": (get(b"Host: y"), 400),
    "a host with a slash": (get(host=b"Host: a/b\r\n"), 400),
    "a header that is too large": (get(b"X-A: " + b"x" * 40_000), 400),
    "headers that are too large together": (get(*[b"X-A: " + b"x" * 1000] * 200), 400),
    "an address that is too long": (request(b"GET /" + b"x" * 40_000 + b" HTTP/1.1"), 414),
    "two lengths": (post(b"Transfer-Encoding: chunked", b"Content-Length: 3"), 400),
    "a length that is not a number": (post(b"Content-Length: abc"), 400),
    "a length beyond all numbers": (post(b"Content-Length: " + b"9" * 23), 400),
    "a body that is too large": (post(b"Content-Length: 999999999"), 413),
    "a broken chunk": (post(b"Transfer-Encoding: chunked", body=b"zz\r\n\r\n"), 400),
    "an unknown transfer encoding": (post(b"Transfer-Encoding: gzip"), 501),
    "HTTP/2 without TLS": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "HTTP/9.9": (request(b"GET /x HTTP/9.9"), 505),
    "another protocol": (b"GET /x XTTP/1.1\r\n\r\n", 400),
    "TLS": (bytes.fromhex("16030100c8010000c403"), 400),
    "bytes": (b"\xff\xfe\xfd\r\n\r\n", 400),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_http_is_refused_in_json(served: BalancerHarness, case: str) -> None:
    sent, status = REFUSED[case]
    head, _, body = raw(served, sent).partition(b"\r\n\r\n")
    assert head.split()[1] == str(status).encode()
    assert b"Content-Type: application/json" in head.splitlines()
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_the_usual_methods_reach_a_worker(served: BalancerHarness, method: str) -> None:
    sent = request(f"{method} /x%C3%A4?q=%C3%A4 HTTP/1.1".encode(), b"Content-Length: 0")
    assert raw(served, sent).split()[1] == b"200"


def test_http_0_9_gets_a_body_alone(served: BalancerHarness) -> None:
    assert b"HTTP/" not in raw(served, b"GET /x\r\n")


def test_an_external_server_decides_on_methods_itself(tmp_path: Path) -> None:
    made = make_balancer(tmp_path, slots=1, own_workers=False)
    made.start_worker("w1")
    made.start()
    try:
        answer = raw(made, request(b"PROPFIND /work HTTP/1.1"))
    finally:
        made.stop()
    assert answer.split()[1] == b"200"
