"""A model whose service time is known: what is left of a request's time is the serving layer's."""

from __future__ import annotations

import time
from typing import Any


class Sleep:
    """``predict({"seconds": s})`` holds the worker for ``s`` seconds and uses no processor."""

    def setup(self, device: str) -> None:
        self.device = device

    def predict(self, request: dict[str, Any]) -> dict[str, float]:
        begun = time.perf_counter()
        time.sleep(float(request["seconds"]))
        return {"slept": time.perf_counter() - begun}
