"""An HTTP server that knows nothing of gpufarm, as a user would bring it: aiohttp, one at a time.

``python standin.py --port P [--id w1] [--load-seconds 0.2] [--fail MESSAGE]``
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from aiohttp import web

busy = asyncio.Lock()
IDENTITY: dict[str, Any] = {"pid": os.getpid()}


async def work(request: web.Request) -> web.Response:
    """Hold the one device for ``seconds``."""
    async with busy:
        await asyncio.sleep(float(request.query.get("seconds", "0.02")))
    return web.json_response(IDENTITY)


async def size(request: web.Request) -> web.Response:
    digest, total = hashlib.sha256(), 0
    async for chunk in request.content.iter_any():
        digest.update(chunk)
        total += len(chunk)
    return web.json_response({"bytes": total, "sha256": digest.hexdigest()})


async def status(request: web.Request) -> web.Response:
    """Answer with any status; ``only`` names the worker that does, the others answer 200."""
    only = request.query.get("only", IDENTITY["id"])
    code = int(request.match_info["code"]) if only == IDENTITY["id"] else 200
    return web.json_response(
        IDENTITY | {"error": {"message": "so asked"}}, status=code, headers={"Retry-After": "7"}
    )


async def refuse(request: web.Request) -> web.Response:
    """Refuse as the farm's own workers do.

    ``only`` names the workers that refuse, ``end`` those that die instead.
    """
    body = await request.read()
    me = IDENTITY["id"]
    if me == request.query.get("end"):
        os._exit(9)
    if me != request.query.get("only", me):
        seen = {"method": request.method, "path": request.raw_path}
        return web.json_response(IDENTITY | seen | {"sha256": hashlib.sha256(body).hexdigest()})
    return web.json_response(
        {"error": {"message": "for nginx alone"}},
        status=502,
        headers={"X-Accel-Redirect": f"/.gpufarm/{request.match_info['code']}", "Retry-After": "7"},
    )


async def steer(request: web.Request) -> web.Response:
    """Answer 200 with a header that nginx takes as an order; without ``to`` it leads back here."""
    to = request.query.get("to", "/steer")
    return web.json_response(IDENTITY, headers={"X-Accel-Redirect": to})


async def headers(request: web.Request) -> web.Response:
    answer = web.json_response(dict(request.headers))
    answer.headers["X-Request-ID"] = "the worker's own"
    return answer


async def stream(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse(
        headers={"X-Accel-Buffering": "no"} if "now" in request.query else {}
    )
    await answer.prepare(request)
    for number in range(int(request.query.get("n", "5"))):
        await answer.write(f"{number}\n".encode())
        await asyncio.sleep(float(request.query.get("seconds", "0.2")))
    return answer


async def big(request: web.Request) -> web.Response:
    return web.Response(body=b"x" * int(request.query["bytes"]))


async def end(request: web.Request) -> web.Response:
    """Die at once, in the middle of the request."""
    if request.query.get("only", IDENTITY["id"]) == IDENTITY["id"]:
        os._exit(9)
    return web.json_response(IDENTITY)


async def health(request: web.Request) -> web.Response:
    """Blocks while a request is being worked on, as fish-speech's does."""
    async with busy:
        return web.json_response({"status": "ok"})


async def metrics(request: web.Request) -> web.Response:
    """Answer with a page of HTML, as servers do that have one page for every path."""
    html = "<style>\nbody { margin: 0 }\n</style>\n"
    return web.Response(text=html, content_type="text/html")


async def environment(request: web.Request) -> web.Response:
    return web.json_response({"argv": sys.argv, "env": dict(os.environ), "cwd": str(Path.cwd())})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--id", default="standin")
    parser.add_argument("--load-seconds", type=float, default=0.0)
    parser.add_argument("--fail", default="")
    options = parser.parse_args()
    IDENTITY["id"] = options.id
    time.sleep(options.load_seconds)
    if options.fail:
        print(options.fail, file=sys.stderr)
        sys.exit(3)
    app = web.Application(client_max_size=2**30)
    app.router.add_route("*", "/work", work)
    app.router.add_post("/size", size)
    app.router.add_route("*", "/status/{code}", status)
    app.router.add_route("*", "/refuse/{code}", refuse)
    app.router.add_route("*", "/steer", steer)
    app.router.add_get("/headers", headers)
    app.router.add_get("/stream", stream)
    app.router.add_get("/big", big)
    app.router.add_route("*", "/end", end)
    app.router.add_get("/v1/health", health)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/environment", environment)
    print(json.dumps({"standin": options.id, "port": options.port}), flush=True)
    web.run_app(
        app,
        host="127.0.0.1",
        port=options.port,
        print=lambda *_: None,
        access_log=None,
        keepalive_timeout=90,
        shutdown_timeout=20,
    )


if __name__ == "__main__":
    main()
