"""A model's health report that hangs, and callers that read slowly: neither holds the others up."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import psutil

from tests.farm.harness import REPOSITORY, FarmUnderTest, new_farm
from tests.waiting import until

MODELS = """
import time

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


def test_a_health_report_that_hangs_takes_no_request_with_it() -> None:
    with new_farm() as farm:
        serve(farm, "Stuck", request_timeout=10)
        farm.run("up")
        (farm.folder / "stuck").touch()
        with farm.load("/predict", clients=3) as load:
            for _ in range(3):
                assert httpx.get(f"{farm.url}/health", timeout=10).status_code == 200
                farm.run("ps")
            (farm.folder / "stuck").unlink()
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


def test_slow_readers_hold_no_worker_whose_model_is_done() -> None:
    with new_farm() as farm:
        serve(farm, "Long", request_timeout=30)
        farm.run("up")
        body = b'{"pieces": 100, "size": 50000}'  # 5 MB in all, at 4 kB/s for each
        with slow_readers(farm, 3, body, 4000) as received:
            with farm.load("/predict", clients=4) as load:
                until(lambda: load.count >= 140, "the others are answered")
            load.check(at_least=140)
            assert max(received) < 5_000_000, "they are still reading"


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
