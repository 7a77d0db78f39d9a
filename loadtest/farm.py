"""Read a farm's /health: its workers, their devices and what really computes."""

from __future__ import annotations

from typing import Any

import httpx

PATIENCE = 10.0
_NOT_REPORTED = "not reported"


class NoFarmError(Exception):
    """No farm answers at that address; the message names the remedy."""


def describe(url: str) -> dict[str, Any]:
    """``{"url", "workers": [{"id", "device", "dtype", "engine", "provider", "model"}]}``.

    Only what /health reports; None for what it does not. Raises NoFarmError.
    """
    try:
        answer = httpx.get(f"{url}/health", timeout=PATIENCE, trust_env=False)
        health = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise NoFarmError(
            f"no farm answers at {url}/health ({type(error).__name__}: {error}); "
            "`gpufarm up` starts one, --host URL names another"
        ) from None
    if not isinstance(health, dict) or answer.status_code != 200:
        raise NoFarmError(f"{url}/health answers {answer.status_code}: no worker is ready there")
    if "workers" in health:
        ready = [worker for worker in health["workers"] if worker.get("state") == "ready"]
        workers = [{**worker, **(worker.get("health") or {})} for worker in ready]
    else:
        # A worker asked directly, or by nginx while the controller is away.
        workers = [health]
    keys = ("id", "device", "dtype", "engine", "provider", "model")
    return {"url": url, "workers": [{key: worker.get(key) for key in keys} for worker in workers]}


def named(farm: dict[str, Any], key: str) -> str:
    """Join the different values that the workers report under ``key``: "cpu", "cuda:0, cuda:1"."""
    values = {str(worker[key]) for worker in farm["workers"] if worker.get(key)}
    return ", ".join(sorted(values)) or _NOT_REPORTED
