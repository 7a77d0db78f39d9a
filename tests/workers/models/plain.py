"""Models of /predict."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from workers.errors import ApiError
from workers.model.responses import Response


class Echo:
    def setup(self, device: str) -> None:
        self.device = device
        self.threads = {threading.current_thread().name}

    def warm_up(self) -> None:
        self.threads.add(threading.current_thread().name)

    def health(self) -> dict[str, Any]:
        return {"dtype": "float32", "engine": "echo", "threads": sorted(self.threads)}

    def longest_request(self) -> dict[str, Any]:
        return {"path": "/predict", "json": {"longest": True}}

    def predict(self, request: Any) -> Any:
        self.threads.add(threading.current_thread().name)
        if isinstance(request, bytes):
            return request[::-1]
        if request == "text":
            return "plain text"
        if request == "device":
            return {"device": self.device}
        return {"echo": request}


class Slow:
    """Works for ``seconds`` (or until the file ``until`` exists) and notes what it ran."""

    def __init__(self, journal: str = "") -> None:
        self.journal = Path(journal) if journal else None

    def setup(self, device: str) -> None:
        pass

    def note(self, word: str) -> None:
        if self.journal is not None:
            with self.journal.open("a") as file:
                file.write(word + "\n")

    def predict(self, request: dict[str, Any]) -> Any:
        self.note(f"ran {request.get('name')}")
        time.sleep(request.get("seconds", 0))
        until = request.get("until")
        while until is not None and not Path(until).exists():
            time.sleep(0.01)
        if request.get("sticky"):
            raise RuntimeError("CUDA error: unspecified launch failure")
        return {"name": request.get("name")}


class Gated:
    """Loads until the file ``gate`` is there."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def setup(self, device: str) -> None:
        (self.folder / "loading").touch()
        while not (self.folder / "gate").exists():
            time.sleep(0.01)

    def predict(self, request: Any) -> Any:
        return request


class Counting(Slow):
    """A generator that notes when it is closed."""

    def predict(self, request: dict[str, Any]) -> Iterator[Any]:
        kind = request.get("kind", "json")
        try:
            for number in range(request.get("count", 3)):
                if number == request.get("fail_at"):
                    raise RuntimeError("the secret of the model")
                yield {"json": {"n": number}, "bytes": b"%d" % number, "text": str(number)}[kind]
                time.sleep(request.get("seconds", 0))
                until = request.get("until")
                while until is not None and not Path(until).exists():
                    time.sleep(0.01)
                    yield {"tick": True}
        finally:
            self.note(f"closed on {threading.current_thread().name}")


class Flood(Slow):
    """Streams ``count`` items of ``size`` bytes."""

    def predict(self, request: dict[str, Any]) -> Iterator[bytes]:
        for number in range(request["count"]):
            yield bytes([number % 256]) * request["size"]


class Reporting:
    """Counts what it ran; its health() never comes back while the file ``hang`` exists."""

    def __init__(self, hang: str) -> None:
        self.hang = Path(hang)
        self.ran = 0

    def setup(self, device: str) -> None:
        pass

    def health(self) -> dict[str, Any]:
        while self.hang.exists():
            time.sleep(0.01)
        return {"ran": self.ran, "engine": "own", "uuid": "GPU-1234"}

    def longest_request(self) -> dict[str, Any]:
        return self.health()

    def predict(self, request: Any) -> Any:
        self.ran += 1
        return request


class Answers:
    """Answers with the status and headers that are asked for, returned or raised."""

    def setup(self, device: str) -> None:
        pass

    def predict(self, request: dict[str, Any]) -> Response:
        if request.get("raises"):
            raise ApiError(request["status"], "says the model")
        return Response(b"made", "text/plain", request["status"], request.get("headers"))


class Async:
    """Every method is ``async def``; a task that setup began goes on during requests."""

    async def setup(self, device: str) -> None:
        self.loop = asyncio.get_running_loop()
        self.arrived: asyncio.Queue[Any] = asyncio.Queue()
        self.echo = asyncio.create_task(self._echo())

    async def _echo(self) -> None:
        self.answers: asyncio.Queue[Any] = asyncio.Queue()
        while True:
            await self.answers.put(await self.arrived.get())

    async def warm_up(self) -> None:
        assert await self.predict("warm") == {"echo": "warm", "one_loop": True}

    async def health(self) -> dict[str, Any]:
        return {"engine": "async", "thread": threading.current_thread().name}

    async def longest_request(self) -> dict[str, Any]:
        return {"path": "/predict", "json": "longest"}

    async def predict(self, request: Any) -> Any:
        if request == "refuse":
            from workers.model.contract import InvalidRequest

            raise InvalidRequest("not this one")
        if request == "fail":
            raise KeyError("the secret of the model")
        await asyncio.sleep(0)
        await self.arrived.put(request)
        return {
            "echo": await self.answers.get(),
            "one_loop": asyncio.get_running_loop() is self.loop,
        }


class AsyncStream(Slow):
    """An async generator within a timeout that is open across its yields, as clients write it."""

    async def predict(self, request: dict[str, Any]) -> AsyncIterator[Any]:
        task = asyncio.current_task()
        try:
            async with asyncio.timeout(60):
                for number in range(request.get("count", 3)):
                    if number == request.get("fail_at"):
                        raise RuntimeError("the secret of the model")
                    yield {"n": number, "one_task": asyncio.current_task() is task}
                    until = request.get("until")
                    while until is not None and not Path(until).exists():  # noqa: ASYNC240
                        await asyncio.sleep(0.01)
                        yield {"tick": True}
        finally:
            await asyncio.sleep(0)
            self.note(f"closed on {threading.current_thread().name}")


class Faulty:
    """Fails in every way that a model can."""

    def setup(self, device: str) -> None:
        pass

    def predict(self, request: dict[str, Any]) -> Any:
        kind = request["kind"]
        if kind == "value":
            raise ValueError("the secret of the model")
        if kind == "exit":
            raise SystemExit(7)
        if kind == "object":
            return {"a": object()}
        if kind == "nan":
            return {"a": float("nan")}
        if kind == "set":
            return {"a": {1}}
        if kind == "surrogate":
            return "\ud800"
        if kind == "sticky":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if kind == "memory":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        if kind == "refuse":
            from workers.model.contract import InvalidRequest

            raise InvalidRequest("kind must not be refuse")
        if kind == "numpy":
            import numpy as np

            return {"a": np.arange(3), "b": np.float32(0.5)}
        return kind
