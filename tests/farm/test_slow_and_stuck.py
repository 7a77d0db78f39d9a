"""A model's health report that hangs, and callers that read slowly: neither holds the others up."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import psutil
import pytest

from tests.farm.harness import REPOSITORY, FarmUnderTest, new_farm
from tests.waiting import until

MODELS = """
import time
from pathlib import Path

HERE = Path(__file__).parent


class Stuck:
    \"\"\"Its health report hangs while a file named "stuck" lies beside it.\"\"\"

    def setup(self, device):
        pass

    def health(self):
        while (HERE / "stuck").exists():
            time.sleep(0.05)
        return {"engine": "none"}

    def predict(self, request):
        return {"ok": True}


class Long:
    \"\"\"Answers at once, or streams ``pieces`` of ``size`` bytes.\"\"\"

    def setup(self, device):
        pass

    def predict(self, request):
        if not request.get("pieces"):
            return {"ok": True}
        return (b"x" * request["size"] for _ in range(request["pieces"]))
"""


def serve(farm: FarmUnderTest, target: str, request_timeout: float, count: int = 3) -> None:
    (farm.folder / "models.py").write_text(MODELS)
    farm.configure(f"""
port = {farm.port}
state_dir = "state"
model.target = "models:{target}"
footprint.bytes = "64MiB"
budget.ram = "8GiB"
[workers]
count = {count}
max = {count}
request_timeout = {request_timeout}
load_timeout = 60
path = ["{REPOSITORY}"]
""")


def test_asking_for_health_does_not_hang_an_idle_farm() -> None:
    """As many requests as there are workers, after a caller has asked for the health of all."""
    with new_farm() as farm:
        serve(farm, "Stuck", request_timeout=10)
        farm.run("up")
        (farm.folder / "stuck").touch()
        for _ in range(3):
            assert httpx.get(f"{farm.url}/health", timeout=10).status_code == 200
        farm.run("ps")
        answers = [httpx.post(f"{farm.url}/predict", json={}, timeout=30) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200] * 3
        (farm.folder / "stuck").unlink()
        farm.wait_for(w1="ready", w2="ready", w3="ready")
        with farm.load("/predict", clients=3) as load:
            until(lambda: load.count >= 30, "requests are answered")
        load.check()


@contextmanager
def slow_readers(farm: FarmUnderTest, count: int, body: bytes, rate: int) -> Iterator[list[int]]:
    """Callers that take ``rate`` bytes a second of what is streamed to them; what each has got."""
    ended = threading.Event()
    received = [0] * count

    def read(number: int) -> None:
        with socket.create_connection(("127.0.0.1", farm.port)) as caller:
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            caller.sendall(head.encode() + body)
            while not ended.wait(0.25):
                piece = caller.recv(rate // 4)
                if not piece:
                    return
                received[number] += len(piece)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: all(received), "every reader gets something")
        yield received
    finally:
        ended.set()
        for thread in threads:
            thread.join(30)


STREAMS = {
    # More than 1,024 items and what sockets take, less than a bound of some MiB and they do.
    "of many small items": (b'{"pieces": 12000, "size": 1000}', 10),
    # More than all bounds and sockets take: the device waits, but not until the deadline.
    "that never end": (b'{"pieces": 8000, "size": 16000}', 30),
}


@pytest.mark.parametrize(("body", "seconds"), STREAMS.values(), ids=STREAMS.keys())
def test_slow_readers_of_streams_cost_others_no_request(body: bytes, seconds: int) -> None:
    """Others give up long before the streams' own deadline."""
    with new_farm() as farm:
        serve(farm, "Long", request_timeout=60)
        farm.run("up")

        def ask(_: int) -> int:
            head = {"X-Request-Timeout": str(seconds)}
            return httpx.post(f"{farm.url}/predict", json={}, headers=head, timeout=90).status_code

        with slow_readers(farm, 3, body, 4000), ThreadPoolExecutor(4) as pool:
            assert Counter(pool.map(ask, range(40))) == {200: 40}


def test_readers_that_hold_a_device_are_cut_off_and_their_memory_is_bounded() -> None:
    with new_farm() as farm:
        serve(farm, "Long", request_timeout=60, count=2)
        farm.run("up")
        pids = farm.pids()
        body = b'{"pieces": 1000, "size": 2097152}'  # 2 GB
        with slow_readers(farm, 2, body, 4000):
            begun = time.monotonic()
            largest = 0
            while httpx.post(f"{farm.url}/predict", json={}, timeout=60).status_code != 200:
                largest = max(largest, *(_resident(pid) for pid in pids.values()))
                assert time.monotonic() - begun < 50, "they hold every device"
            largest = max(largest, *(_resident(pid) for pid in pids.values()))
            assert largest < 400 * 2**20
            until(lambda: "slow_reader" in _metrics(farm), "it is counted")
        assert farm.pids() == pids


def _resident(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


def _metrics(farm: FarmUnderTest) -> str:
    return httpx.get(f"{farm.url}/metrics", timeout=20).text
