"""A steady load of requests: some callers, one request after another from each."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from tests.waiting import until

JSON = {"Content-Type": "application/json"}


@dataclass
class Load:
    """What a steady load of requests has met so far."""

    statuses: Counter[int] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    workers: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        return sum(self.statuses.values()) + len(self.errors)

    def check(self, at_least: int = 20) -> None:
        """Not one failed request."""
        assert not self.errors, self.errors[:3]
        assert set(self.statuses) == {200}, self.statuses
        assert self.statuses[200] >= at_least


@contextmanager
def steady(url: str, path: str, body: bytes, clients: int = 4) -> Iterator[Load]:
    """POST ``body`` on and on from every client while the block runs."""
    load, ended, lock = Load(), threading.Event(), threading.Lock()

    def call(client: httpx.Client) -> None:
        try:
            answer = client.post(path, content=body, headers=JSON)
            with lock:
                load.statuses[answer.status_code] += 1
                load.workers[answer.headers.get("X-Worker-Id", "")] += 1
        except httpx.HTTPError as error:
            with lock:
                load.errors.append(repr(error))

    def go() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not ended.is_set():
                call(client)

    threads = [threading.Thread(target=go) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: load.count >= clients, "the load has begun")
        yield load
        seen = load.count
        until(lambda: load.count >= seen + 2 * clients, "the load goes on")
    finally:
        ended.set()
        for thread in threads:
            thread.join(70)
