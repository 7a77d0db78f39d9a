"""/v1/audio/speech through the official client and without it."""

from __future__ import annotations

import base64
import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import soundfile

from tests.workers.harness import TIMEOUT, WorkerProcess, eventually

RATE = 22050


@pytest.fixture(scope="module")
def hum(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    folder = tmp_path_factory.mktemp("hum")
    with WorkerProcess(
        folder,
        "tests.workers.models.speech:Hum",
        {"sample_rate": RATE, "journal": str(folder / "journal")},
        model={"aliases": ["mine"], "voice_aliases": {"alloy": "high"}},
    ) as worker:
        yield worker


@pytest.fixture(scope="module")
def client(hum: WorkerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        api_key="none",
        base_url=f"{hum.url}/v1",
        max_retries=0,
        timeout=TIMEOUT,
    ) as client:
        yield client


def speak(worker: WorkerProcess, **body: Any) -> httpx.Response:
    return worker.client.post("/v1/audio/speech", json={"input": "hello", **body})


def duration(body: bytes) -> float:
    with soundfile.SoundFile(io.BytesIO(body)) as file:
        return float(len(file.read()) / file.samplerate)


@pytest.mark.parametrize("name", ["mp3", "opus", "flac", "wav"])
def test_the_official_client_gets_every_format(client: openai.OpenAI, name: Any) -> None:
    speech = client.audio.speech.create(
        model="tts-1", voice="low", input="hello world", response_format=name
    )
    # an mp3 whose head left before its length was known ends with a few frames of silence
    assert duration(speech.content) == pytest.approx(1.1, abs=0.15)


def test_the_official_client_streams(client: openai.OpenAI) -> None:
    with client.audio.speech.with_streaming_response.create(
        model="default", voice="default", input="hello", response_format="pcm"
    ) as response:
        body = b"".join(response.iter_bytes())
        assert response.headers["content-type"] == "audio/pcm"
        assert response.headers["x-sample-rate"] == "24000"
    assert len(body) == pytest.approx(2 * 24000 * 0.5, abs=4)


@pytest.mark.parametrize("name", [None, "mp3", "opus", "wav", "pcm"])
def test_the_official_client_gets_the_first_bytes_while_more_is_made(
    hum: WorkerProcess, client: openai.OpenAI, tmp_path: Path, name: Any
) -> None:
    """As OpenAI's first example is written, but for the input. The speech waits for the gate."""
    gate = tmp_path / "gate"
    options = {} if name is None else {"response_format": name}
    with client.audio.speech.with_streaming_response.create(
        model="gpt-4o-mini-tts",
        voice="alloy",
        input="hello",
        extra_body={"gate": str(gate)},
        **options,
    ) as response:
        chunks = response.iter_bytes()
        body = next(chunks)
        assert body
        assert hum.health()["running"] == 1
        assert "x-audio-seconds" not in response.headers
        gate.touch()
        body += b"".join(chunks)
    if name == "pcm":
        assert len(body) == pytest.approx(2 * 24000 * 0.5, abs=4)
    else:
        assert duration(body) == pytest.approx(0.5, abs=0.15)


def test_the_official_client_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["test", "mine", "default"]
    assert client.models.retrieve("mine").owned_by == "gpufarm"


def test_the_official_client_understands_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.audio.speech.create(model="test", voice="zoe", input="hello")
    assert missing.value.code == "voice_not_found"
    assert "low, high, alloy, default" in missing.value.message
    with pytest.raises(openai.NotFoundError, match="test, mine, default"):
        client.audio.speech.create(model="gpt", voice="low", input="hello")
    with pytest.raises(openai.BadRequestError, match="is not supported"):
        client.audio.speech.create(model="test", voice="low", input="x", response_format="aac")
    with pytest.raises(openai.BadRequestError, match="this cannot be spoken"):
        client.audio.speech.create(model="test", voice="low", input="unspeakable")
    with pytest.raises(openai.InternalServerError, match="RuntimeError"):
        client.audio.speech.create(model="test", voice="low", input="!")


def test_minimal_curl_request(hum: WorkerProcess) -> None:
    answer = hum.client.post(
        "/v1/audio/speech",
        content=b'{"input": "hello"}',
        headers={"content-type": "application/x-www-form-urlencoded"},
    )
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "audio/mpeg"


@pytest.mark.parametrize("name", ["pcm", "wav", "mp3", "opus", "flac"])
def test_complete_response_has_its_length_and_real_time_factor(
    hum: WorkerProcess, name: str
) -> None:
    before = hum.metric("gpufarm_audio_seconds_total")
    answer = speak(hum, response_format=name, speed=2, stream=False)
    assert float(answer.headers["x-audio-seconds"]) == pytest.approx(0.25, abs=0.001)
    assert float(answer.headers["x-real-time-factor"]) > 0
    assert "decoder;dur=" in answer.headers["server-timing"]
    assert int(answer.headers["content-length"]) == len(answer.content)
    if name == "wav":
        assert struct.unpack("<I", answer.content[40:44])[0] == len(answer.content) - 44
    eventually(
        lambda: hum.metric("gpufarm_audio_seconds_total") >= before + 0.25 - 1e-3, "the count"
    )
    assert hum.metric("gpufarm_stage_duration_seconds_count", stage="decoder") >= 1
    assert hum.metric("gpufarm_real_time_factor_count") >= 1


def test_opus_reports_its_sample_rate(hum: WorkerProcess) -> None:
    assert speak(hum, response_format="opus").headers["x-sample-rate"] == "24000"


@pytest.mark.parametrize("name", ["pcm", "wav", "mp3", "opus"])
def test_audio_is_sent_while_more_is_generated(
    hum: WorkerProcess, tmp_path: Path, name: str
) -> None:
    gate = tmp_path / "gate"
    body = {"input": "hi", "response_format": name, "gate": str(gate)}
    with hum.client.stream("POST", "/v1/audio/speech", json=body) as answer:
        assert answer.headers["x-accel-buffering"] == "no"
        chunks = answer.iter_raw()
        first = next(chunks)
        assert first
        assert hum.health()["running"] == 1
        gate.touch()
        rest = b"".join(chunks)
    if name == "pcm":
        complete = speak(hum, input="hi", response_format="pcm").content
        assert first + rest == complete
    else:
        assert duration(first + rest) == pytest.approx(0.2, abs=0.15)


def test_samples_are_the_same_streamed_and_complete(hum: WorkerProcess) -> None:
    """The samples are, whichever way they leave; a wav keeps the model's rate."""
    wav = speak(hum, response_format="wav", stream=False).content
    assert speak(hum, response_format="wav").content[44:] == wav[44:]
    assert speak(hum, response_format="wav", stream_format="audio").content[44:] == wav[44:]
    pcm = speak(hum, response_format="pcm", stream=False).content
    assert speak(hum, response_format="pcm").content == pcm
    heard, _ = soundfile.read(io.BytesIO(wav))
    assert len(heard) == 5 * int(RATE * 0.1)


def test_events_carry_the_same_audio(hum: WorkerProcess) -> None:
    pcm = speak(hum, response_format="pcm").content
    answer = speak(hum, response_format="pcm", stream_format="sse")
    assert answer.headers["content-type"] == "text/event-stream"
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line]
    assert [event["type"] for event in events] == ["speech.audio.delta"] * 6 + ["speech.audio.done"]
    assert b"".join(base64.b64decode(event["audio"]) for event in events[:-1]) == pcm
    assert set(events[-1]["usage"]) >= {"input_tokens", "output_tokens", "total_tokens"}
    flac = speak(hum, response_format="flac", stream_format="sse")
    events = [json.loads(line[6:]) for line in flac.text.splitlines() if line]
    audio = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
    assert duration(audio) == pytest.approx(0.5, abs=0.01)


def test_error_is_the_last_event(hum: WorkerProcess) -> None:
    answer = speak(hum, input="ab!", response_format="pcm", stream_format="sse")
    last = json.loads(answer.text.splitlines()[-2][6:])
    assert last["type"] == "error"
    assert last["error"]["code"] == "model_failed"
    assert "secret" not in answer.text


def test_error_within_a_stream_cuts_it_off(hum: WorkerProcess) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        speak(hum, input="ab!", response_format="pcm")


def test_disconnect_stops_the_speech(hum: WorkerProcess, tmp_path: Path) -> None:
    before = hum.metric("gpufarm_requests_cancelled_total", stage="streaming")
    body = {"input": "hi", "response_format": "pcm", "gate": str(tmp_path / "never")}
    with hum.client.stream("POST", "/v1/audio/speech", json=body) as answer:
        next(answer.iter_raw())
    eventually(lambda: hum.health()["running"] == 0, "the end of the speech")
    after = hum.metric("gpufarm_requests_cancelled_total", stage="streaming")
    assert after == before + 1


def test_deadline_stops_a_complete_speech(hum: WorkerProcess, tmp_path: Path) -> None:
    answer = hum.client.post(
        "/v1/audio/speech",
        json={"input": "hi", "response_format": "flac", "gate": str(tmp_path / "never")},
        headers={"X-Request-Timeout": "0.3"},
    )
    assert answer.status_code == 504
    eventually(lambda: hum.health()["running"] == 0, "the end of the speech")


def test_long_input_is_spoken_and_longer_is_rejected(hum: WorkerProcess) -> None:
    long = speak(hum, input="a" * 10_000, speed=4, response_format="pcm")
    assert long.status_code == 200
    refused = speak(hum, input="a" * 16_385)
    assert refused.status_code == 400
    assert "at most 16384" in refused.json()["error"]["message"]


@pytest.mark.parametrize("number", ["1" * 400, "-" + "1" * 400, "1e999", "1" * 300])
def test_a_number_of_any_size_is_400(hum: WorkerProcess, number: str) -> None:
    for field in ("speed", "seed"):
        answer = hum.client.post(
            "/v1/audio/speech", content=f'{{"input": "hello", "{field}": {number}}}'
        )
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_voices_and_missing_routes_of_a_speech_model(hum: WorkerProcess) -> None:
    assert hum.client.get("/v1/audio/voices").json() == {"voices": ["low", "high"]}
    assert hum.client.post("/predict", json={}).status_code == 404
    assert hum.client.get("/longest_request").status_code == 404
    report = hum.health()
    assert (report["sample_rate"], report["voices"]) == (RATE, ["low", "high"])
    assert speak(hum, voice={"id": "high"}).status_code == 200
