"""Locust beside the farm, distributed, told what to do through its own page."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.compose.project import the_farm
from tests.waiting import until

WORKERS = 2
REQUESTS = 10


def test_a_master_and_two_workers_load_the_farm() -> None:
    page, farm = "http://127.0.0.1:8089", the_farm()
    try:
        farm.compose("--profile", "loadtest", "up", "-d", "--no-build", "--pull", "never")
        until(lambda: len(stats(page)["workers"]) == WORKERS, "both workers have come")
        begun = httpx.post(f"{page}/swarm", data={"user_count": 4, "spawn_rate": 4}, timeout=30)
        assert begun.json()["success"], begun.text
        until(lambda: answered(page) >= REQUESTS, "requests are answered", seconds=120, every=0.5)
        httpx.get(f"{page}/stop", timeout=30)
        final = stats(page)
        assert final["fail_ratio"] == pytest.approx(0), final["errors"]
        for row in final["stats"]:
            print(row["method"], row["name"], row["num_requests"], row["avg_response_time"])
    finally:
        farm.compose("--profile", "loadtest", "rm", "-sf", "locust", "locust-worker")


def stats(page: str) -> dict[str, Any]:
    answer = httpx.get(f"{page}/stats/requests", timeout=10)
    found: dict[str, Any] = answer.json()
    return found


def answered(page: str) -> int:
    """Requests of HTTP, without the statistics that are no requests."""
    rows = stats(page)["stats"]
    return sum(row["num_requests"] for row in rows if row["method"] == "POST")
