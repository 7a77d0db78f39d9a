"""Models for farms under test, and the configuration that serves them."""

from __future__ import annotations

import json

from tests.farm.harness import REPOSITORY, FarmUnderTest

WORK = """
import os
import time
from pathlib import Path

HERE = Path(__file__).parent


class Work:
    \"\"\"Sleeps. Its setup fails while a file named "broken" lies beside it.\"\"\"

    def setup(self, device):
        if (HERE / "broken").exists():
            raise OSError("the weights cannot be read just now")
        self.version = VERSION

    def predict(self, request):
        time.sleep(request.get("seconds", 0.01))
        return {"version": self.version, "pid": os.getpid()}


VERSION = 1
"""


def serve_work(
    farm: FarmUnderTest,
    *,
    target: str = "work:Work",
    workers: str = "count = 2\nmax = 4",
    budget: str = "",
    more: str = "",
) -> None:
    """Write the model and a configuration that serves it."""
    (farm.folder / "work.py").write_text(WORK)
    farm.configure(configuration(farm, target=target, workers=workers, budget=budget, more=more))


def configuration(
    farm: FarmUnderTest, *, target: str, workers: str, budget: str = "", more: str = ""
) -> str:
    return f"""
port = {farm.port}
state_dir = "state"
model.target = {json.dumps(target)}
footprint.bytes = "64MiB"
{more}
[workers]
request_timeout = 15
load_timeout = 60
path = ["{REPOSITORY}"]
{workers}
[budget]
ram = "8GiB"
{budget}
"""
