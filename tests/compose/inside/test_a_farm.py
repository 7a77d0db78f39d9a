"""`docker-compose up` as the README has it: the life of one farm, in order."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import openai
import pytest
import soundfile

from tests.compose.project import Project, the_farm
from tests.repository import REPOSITORY
from tests.steady import steady
from tests.waiting import until

FARM = the_farm()
SPEECH = "/v1/audio/speech"
# Not streamed: an answer that has begun when its worker is killed cannot be sent to another one.
SHORT = json.dumps(
    {"input": "Good morning.", "response_format": "wav", "seed": 1, "stream": False}
).encode()
LONG = {
    "input": "The farmer walked along the field and counted every tree that the storm had left. "
    * 4,
    "response_format": "pcm",
    "seed": 1,
}


def ready_workers() -> set[str]:
    return {id_ for id_, worker in FARM.workers().items() if worker["state"] == "ready"}


@pytest.fixture(scope="module", autouse=True)
def first_seconds() -> float:
    """How long the first start took, with everything to be measured and nothing in a cache."""
    return FARM.seconds_to_ready()


@pytest.fixture
def client() -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{FARM.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_every_file_and_profile_is_valid() -> None:
    with_gpus = Project("gpufarm", 8000, override=REPOSITORY / "docker-compose.gpu.yml")
    for project in (FARM, with_gpus):
        project.compose("config", "-q")
        project.compose("--profile", "*", "config", "-q")


def test_an_unprivileged_user_a_read_only_root_and_no_compiler() -> None:
    assert FARM.inside("id", "-u").strip() == "10001"
    FARM.inside("sh", "-c", "! command -v gcc cc c++ g++ clang make")
    refused = FARM.inside("touch", "/opt/gpufarm/x", expect=1)
    assert "Read-only file system" in refused
    assert "up --foreground" in FARM.inside("sh", "-c", "tr '\\0' ' ' < /proc/1/cmdline")


def test_the_official_client_hears_speech(client: openai.OpenAI) -> None:
    assert (
        "default" in json.dumps(httpx.get(f"{FARM.url}/v1/models").json()) or client.models.list()
    )
    answer = client.audio.speech.create(
        model="default", voice="default", input="Good morning.", response_format="wav"
    )
    samples, rate = soundfile.read(io.BytesIO(answer.content))
    assert len(samples) > 0.3 * rate
    assert abs(samples).max() > 0.01


def test_the_official_client_hears_a_stream(client: openai.OpenAI) -> None:
    with client.audio.speech.with_streaming_response.create(
        model="default", voice="default", input=str(LONG["input"]), response_format="pcm"
    ) as answer:
        chunks = list(answer.iter_bytes(4096))
    assert len(chunks) > 2
    assert sum(map(len, chunks)) % 2 == 0


def test_the_official_client_gets_a_clear_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nonesuch"):
        client.audio.speech.create(model="nonesuch", voice="default", input="Hello.")
    with pytest.raises(openai.BadRequestError, match="aac"):
        client.audio.speech.create(
            model="default", voice="default", input="Hello.", response_format="aac"
        )


def test_every_process_logs_to_stdout() -> None:
    named = {line.partition(" | ")[0] for line in FARM.logs() if " | " in line}
    assert {"gpufarm", "supervisord", "controller", "w1"} <= named


def test_operators_scale_and_restart_under_load() -> None:
    with steady(FARM.url, SPEECH, SHORT, clients=3) as load:
        for count in (1, 3, 1):
            FARM.gpufarm("scale", str(count))
            assert len(ready_workers()) == count
        FARM.gpufarm("scale", "2")
        FARM.gpufarm("restart")
    load.check()
    assert "bound by" in FARM.gpufarm("plan")
    assert "ready" in FARM.gpufarm("ps")


def test_a_killed_worker_is_replaced_and_no_caller_notices() -> None:
    pid = FARM.workers()["w1"]["pid"]
    with steady(FARM.url, SPEECH, SHORT, clients=3) as load:
        FARM.inside("python", "-c", f"import os; os.kill({pid}, 9)")
        until(
            lambda: (w1 := FARM.workers()["w1"])["pid"] != pid and w1["state"] == "ready",
            "another worker is ready",
            every=0.5,
        )
    load.check(at_least=6)
    assert FARM.workers()["w1"]["restarts"] >= 1


class _Stream:
    """A long answer that is read as it comes."""

    def __init__(self) -> None:
        self.begun = False
        self.bytes = 0

    def read(self) -> int:
        with (
            httpx.Client(base_url=FARM.url, timeout=120) as client,
            client.stream("POST", SPEECH, json=LONG) as answer,
        ):
            assert answer.status_code == 200
            for chunk in answer.iter_raw():
                self.begun = True
                self.bytes += len(chunk)
        return self.bytes


def test_a_stopped_container_finishes_what_it_has_begun() -> None:
    whole = _Stream().read()
    streams = [_Stream() for _ in range(4)]
    with ThreadPoolExecutor(len(streams)) as pool:
        answers: list[Future[int]] = [pool.submit(stream.read) for stream in streams]
        until(lambda: any(stream.begun for stream in streams), "a caller has received audio")
        assert not all(answer.done() for answer in answers)
        FARM.compose("stop")
        assert [answer.result() for answer in answers] == [whole] * len(streams)
    assert FARM.inspect()["State"]["ExitCode"] == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{FARM.url}/livez")
    FARM.up()
    assert httpx.post(f"{FARM.url}{SPEECH}", content=SHORT, timeout=60).status_code == 200


def lines_of(farm: Project) -> set[int | None]:
    """How many may wait, as each worker tells; None until it has been asked."""
    return {(worker["health"] or {}).get("queue_size") for worker in farm.workers().values()}


def test_another_configuration_on_the_old_volume(first_seconds: float) -> None:
    changed = Project(
        FARM.name, FARM.port, {"GPUFARM_WORKERS__COUNT": "2", "GPUFARM_WORKERS__QUEUE_SIZE": "5"}
    )
    before = FARM.inside("cat", "/var/lib/gpufarm/footprints.json")
    changed.up()
    assert FARM.inside("cat", "/var/lib/gpufarm/footprints.json") == before
    assert not any("measuring" in line for line in FARM.logs())
    assert len(FARM.workers()) == 2
    until(lambda: lines_of(FARM) == {5}, "both workers tell of their shorter lines", every=0.5)
    seconds = FARM.seconds_to_ready()
    print(f"ready after {first_seconds:.1f} s the first time, after {seconds:.1f} s on its volume")
    assert seconds < first_seconds
