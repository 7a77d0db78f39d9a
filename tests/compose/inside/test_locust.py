"""Locust beside the farm, distributed, and driven through its own page."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from loadtest.measures import AUDIO, CALLER_FACTOR, FACTOR, FIRST_AUDIO, INFERENCE, QUEUE
from tests.compose.project import the_farm
from tests.waiting import until

WORKERS = 2
REQUESTS = 10
PAGE = "http://127.0.0.1:8089"


def test_a_master_and_two_workers_load_the_farm() -> None:
    farm = the_farm()
    try:
        farm.compose("--profile", "loadtest", "up", "-d", "--no-build", "--pull", "never")
        until(lambda: len(stats()["workers"]) == WORKERS, "both workers have come")
        spoken = run()
        names = {row["name"] for row in spoken["stats"]}
        assert names >= {AUDIO, CALLER_FACTOR, FACTOR, INFERENCE, QUEUE}
        assert FIRST_AUDIO not in names
        # A choice made on the page reaches the workers.
        streamed = run(request="stream")
        assert FIRST_AUDIO in {row["name"] for row in streamed["stats"]}
    finally:
        farm.compose("--profile", "loadtest", "rm", "-sf", "locust", "locust-worker")


def run(**choices: str) -> dict[str, Any]:
    """A run of four users, begun and ended on the page; its statistics."""
    form = {"user_count": 4, "spawn_rate": 4, **choices}
    begun = httpx.post(f"{PAGE}/swarm", data=form, timeout=30)
    assert begun.json()["success"], begun.text
    until(lambda: answered() >= REQUESTS, "requests are answered", seconds=120, every=0.5)
    httpx.post(f"{PAGE}/stop", timeout=60).raise_for_status()
    until(lambda: stats()["state"] == "stopped", "the run has ended", seconds=120, every=0.5)
    final = stats()
    for row in final["stats"]:
        print(row["method"], row["name"], row["num_requests"], row["avg_response_time"])
    assert final["fail_ratio"] == pytest.approx(0), final["errors"]
    return final


def stats() -> dict[str, Any]:
    answer = httpx.get(f"{PAGE}/stats/requests", timeout=10)
    found: dict[str, Any] = answer.json()
    return found


def answered() -> int:
    """Requests of HTTP in the run that is on, without the statistics that are no requests."""
    seen = stats()  # Locust keeps a look for two seconds: it may show the run before
    rows = seen["stats"] if seen["state"] == "running" else []
    return sum(row["num_requests"] for row in rows if row["method"] == "POST")
