"""Model classes behind the public address: admission, streams, speech, and the official client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from tests import promtool
from tests.farm.harness import REPOSITORY, FarmUnderTest, new_farm, within
from tests.waiting import until

LOAD_SECONDS = 6.0
"""What a worker of a class takes to start on a loaded machine: an interpreter and its imports."""

MODELS = """
import time

class Work:
    def setup(self, device):
        self.device = device

    def predict(self, request):
        time.sleep(request.get("seconds", 0.02))
        if request.get("fail"):
            raise RuntimeError("the secret of the model")
        return {"device": self.device}

class Count:
    def setup(self, device):
        pass

    def predict(self, request):
        for number in range(request["n"]):
            yield f"{number}\\n"
            time.sleep(request["seconds"])
"""


def of_class(farm: FarmUnderTest, target: str, workers: str = "", model: str = "") -> None:
    (farm.folder / "models.py").write_text(MODELS)
    farm.configure(f"""
port = {farm.port}
state_dir = "state"
[model]
name = "under-test"
target = "{target}"
{model}
[workers]
max = 4
request_timeout = 15
load_timeout = 60
path = ["{REPOSITORY}"]
{workers}
[footprint]
bytes = "64MiB"
[budget]
ram = "8GiB"
""")


@pytest.fixture(scope="module")
def shared() -> Iterator[FarmUnderTest]:
    with new_farm() as farm:
        of_class(farm, "models:Work", "count = 2\nqueue_size = 2")
        assert "/predict" in farm.run("up").stdout
        yield farm


@pytest.fixture
def farm(shared: FarmUnderTest) -> FarmUnderTest:
    shared.admin("PUT", "/workers", {"count": 2})
    until(lambda: shared.states() == {"w1": "ready", "w2": "ready"}, "two workers are ready")
    return shared


def test_a_class_beside_the_configuration_is_served(farm: FarmUnderTest) -> None:
    answer = httpx.post(f"{farm.url}/predict", json={}, headers={"X-Request-ID": "mine"})
    assert answer.json() == {"device": "cpu"}
    assert answer.headers["X-Request-ID"] == "mine"
    assert answer.headers.get_list("X-Worker-Id")[0] in ("w1", "w2")
    assert float(answer.headers["X-Inference-Time-Ms"]) >= 20
    assert "X-Queue-Time-Ms" in answer.headers


def test_scaling_and_restarting_under_load_lose_nothing(farm: FarmUnderTest) -> None:
    with farm.load("/predict", clients=3, body=b'{"seconds": 0.02}') as load:
        farm.run("scale", "1")
        farm.run("scale", "2")
        farm.run("restart")
    load.check(at_least=100)


def test_a_killed_worker_is_replaced_and_no_caller_notices(farm: FarmUnderTest) -> None:
    pid = farm.pids()["w1"]
    with farm.load("/predict", clients=3, body=b'{"seconds": 0.02}') as load:
        begun = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        until(lambda: farm.pids().get("w1", pid) != pid, "a new worker")
        farm.wait_for(w1="ready")
        assert within(LOAD_SECONDS + 2, begun)
    load.check()


def test_every_queue_full_is_429_with_retry_after_and_never_502(farm: FarmUnderTest) -> None:
    def call(_: int) -> httpx.Response:
        return httpx.post(f"{farm.url}/predict", json={"seconds": 0.5}, timeout=30)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(call, range(16)))
    codes = sorted(answer.status_code for answer in answers)
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 6, "two run, and each line takes two"
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
            assert answer.headers["X-Request-ID"]


def test_a_models_exception_is_answered_without_its_traceback(farm: FarmUnderTest) -> None:
    answer = httpx.post(f"{farm.url}/predict", json={"fail": True})
    assert answer.status_code == 500
    assert "RuntimeError" in answer.json()["error"]["message"]
    assert "secret" not in answer.text
    assert "RuntimeError: the secret of the model" in farm.run("logs", "-n", "200").stdout


def test_health_and_metrics_come_from_every_worker(farm: FarmUnderTest) -> None:
    health = httpx.get(f"{farm.url}/health").json()
    assert (health["status"], health["ready"], health["model"]) == ("ready", 2, "under-test")
    assert {worker["health"]["device"] for worker in farm.workers().values()} == {"cpu"}
    until(lambda: httpx.post(f"{farm.url}/predict", json={}).status_code == 200, "a request")
    metrics = httpx.get(f"{farm.url}/metrics").text
    for worker in ("w1", "w2"):
        assert f'worker="{worker}"' in metrics
    assert metrics.count("# TYPE gpufarm_requests_total counter") == 1
    assert metrics.count("# TYPE gpufarm_workers gauge") == 1
    assert metrics.count("# TYPE gpufarm_worker_startup_seconds gauge") == 1
    promtool.check(metrics)


def test_without_the_controller_a_worker_answers_health(farm: FarmUnderTest) -> None:
    controller = farm.pid_of("launcher.controller")
    os.kill(controller, signal.SIGSTOP)
    try:
        answer = httpx.get(f"{farm.url}/readyz", timeout=20)
        assert answer.status_code == 200
        assert answer.headers["X-Worker-Id"] in ("w1", "w2")
    finally:
        os.kill(controller, signal.SIGCONT)


def test_a_class_that_cannot_load_says_why() -> None:
    with new_farm() as farm:
        of_class(farm, "models:Missing", "count = 2")
        message = farm.run("up", expect=1).stderr
        assert "w1 could not load" in message
        assert "Missing" in message


def test_a_stream_comes_through_as_it_is_made() -> None:
    with new_farm() as farm:
        of_class(farm, "models:Count", "count = 1")
        farm.run("up")
        arrivals, received = [], b""
        body = {"n": 4, "seconds": 0.3}
        with httpx.stream("POST", f"{farm.url}/predict", json=body) as answer:
            assert answer.status_code == 200
            for chunk in answer.iter_raw():
                arrivals.append(time.monotonic())
                received += chunk
        assert b"3" in received
        assert arrivals[-1] - arrivals[0] > 0.6


def test_who_ends_a_measurement_ends_its_worker() -> None:
    with new_farm() as farm:
        of_class(farm, "models:Work", "count = 1")
        text = (farm.folder / "gpufarm.toml").read_text()
        long = 'requests = [{path = "/predict", json = {seconds = 12}}]'
        farm.configure(text.replace('bytes = "64MiB"', long))
        with subprocess.Popen(
            farm.command("plan", "--measure"),
            cwd=farm.folder,
            env=farm.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            until((farm.state / "measure-worker.json").exists, "it measures")
            process.terminate()
            assert process.wait(60) == 128 + signal.SIGTERM
        assert farm.processes() == []
        assert not (farm.state / "measure-worker.json").exists()


def test_an_unknown_footprint_is_measured_once(tmp_path: Path) -> None:
    with new_farm() as farm:
        of_class(farm, "models:Work", "count = 1")
        text = (farm.folder / "gpufarm.toml").read_text()
        farm.configure(
            text.replace('bytes = "64MiB"', 'requests = [{path = "/predict", json = {}}]')
        )
        assert "measuring" in farm.run("up").stderr
        plan = json.loads(farm.run("plan", "--json").stdout)
        assert plan["footprint"]["how"] == "measured"
        assert plan["footprint"]["steady"] > 10 * 2**20
        farm.run("down")
        assert "measuring" not in farm.run("up").stderr


def test_the_official_client_speaks_to_it() -> None:
    with new_farm() as farm:
        of_class(farm, "tests.workers.models.speech:Hum", "count = 1", 'aliases = ["tts-1"]')
        assert "/v1/audio/speech" in farm.run("up").stdout
        client = openai.OpenAI(base_url=f"{farm.url}/v1", api_key="unused", max_retries=0)
        assert "under-test" in [model.id for model in client.models.list()]
        speech = client.audio.speech.create(
            model="tts-1", voice="low", input="hello", response_format="wav"
        )
        assert speech.content[:4] == b"RIFF"
        streaming = client.audio.speech.with_streaming_response.create(
            model="default", voice="default", input="hello, world", response_format="pcm"
        )
        with streaming as answer:
            assert sum(len(chunk) for chunk in answer.iter_bytes()) > 1000
        with pytest.raises(openai.NotFoundError, match="under-test"):
            client.audio.speech.create(model="nothing", voice="low", input="hello")
        with pytest.raises(openai.BadRequestError):
            client.audio.speech.create(model="tts-1", voice="low", input="unspeakable")
        farm.run("scale", "0")
        with pytest.raises(openai.InternalServerError) as caught:
            client.audio.speech.create(model="tts-1", voice="low", input="hello")
        assert caught.value.status_code == 503
        assert caught.value.code == "no_worker"
