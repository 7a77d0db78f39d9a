"""The demo voice in real worker processes, through HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime
import pytest

from tests.workers.harness import WorkerProcess, eventually
from tests.workers.voice.tiny_voice import write_voice
from workers.models.voice.weights import DATA, FILES

FOLDER = Path(os.environ.get("GPUFARM_TEST_VOICE", DATA))
MISSING = [name for name in FILES if not (FOLDER / name).exists()]
shipped = pytest.mark.skipif(bool(MISSING), reason=f"{FOLDER} lacks {', '.join(MISSING)}")
TARGET = "workers.models.voice:Voice"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""The environment of workers in slots."""
SENTENCE = "The quick brown fox jumps over the lazy dog."


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WorkerProcess, WorkerProcess]]:
    folder = tmp_path_factory.mktemp("voice")
    with contextlib.ExitStack() as stack:
        first, second = (
            stack.enter_context(
                WorkerProcess(folder, TARGET, {"weights": str(FOLDER)}, environment=ONE_THREAD)
            )
            for _ in range(2)
        )
        yield first, second


@pytest.fixture
def worker(pair: tuple[WorkerProcess, WorkerProcess]) -> WorkerProcess:
    return pair[0]


def speak(worker: WorkerProcess, text: str = "Hello there.", **body: Any) -> httpx.Response:
    return worker.client.post("/v1/audio/speech", json={"input": text, **body})


def frames(worker: WorkerProcess) -> int:
    """Return the frames decoded so far; a busy worker reports its last known number."""
    return int(worker.health()["decoder"]["frames"])


@shipped
def test_speech_in_a_wav(worker: WorkerProcess) -> None:
    answer = speak(worker, SENTENCE, response_format="wav", stream=False)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "audio/wav"
    assert answer.headers["x-sample-rate"] == "16000"
    seconds = float(answer.headers["x-audio-seconds"])
    assert 1.5 < seconds < 6
    assert float(answer.headers["x-real-time-factor"]) > 0
    samples = np.frombuffer(answer.content[44:], dtype="<i2")
    assert len(samples) == round(seconds * 16000)
    assert int(np.abs(samples.astype(np.int32)).max()) > 2000


@shipped
def test_time_is_reported_by_stage(worker: WorkerProcess) -> None:
    answer = speak(worker, response_format="wav", stream=False)
    durations = dict(re.findall(r"(\w+);dur=([\d.]+)", answer.headers["server-timing"]))
    assert {"text", "decoder", "codec"} <= set(durations)
    stages = sum(float(durations[name]) for name in ("text", "decoder", "codec"))
    assert 0 < stages <= float(answer.headers["x-inference-time-ms"]) * 1.01
    name = "gpufarm_stage_duration_seconds_count"
    eventually(
        lambda: all(worker.metric(name, stage=stage) for stage in ("text", "decoder", "codec")),
        "the stages in the metrics",
    )


@shipped
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_two_workers_give_the_same_audio(
    pair: tuple[WorkerProcess, WorkerProcess], temperature: float
) -> None:
    options = {"response_format": "pcm", "seed": 42, "temperature": temperature}
    first, second = (speak(each, SENTENCE, **options) for each in pair)
    assert first.status_code == second.status_code == 200
    assert len(first.content) > 2 * 16000
    assert first.content == second.content
    assert speak(pair[0], SENTENCE, **{**options, "seed": 43}).content != first.content


@shipped
def test_streamed_samples_equal_the_complete_response(worker: WorkerProcess) -> None:
    streamed = speak(worker, SENTENCE, response_format="wav", seed=7)
    assert "content-length" not in streamed.headers
    complete = speak(worker, SENTENCE, response_format="wav", seed=7, stream=False)
    assert complete.content[44:] == streamed.content[44:]


@shipped
def test_the_first_example_of_a_client_library_is_spoken(worker: WorkerProcess) -> None:
    answer = speak(worker, SENTENCE, model="tts-1", voice="alloy", response_format="pcm")
    assert answer.status_code == 200
    assert answer.headers["x-sample-rate"] == "24000"
    complete = speak(worker, SENTENCE, response_format="wav", stream=False)
    seconds = float(complete.headers["x-audio-seconds"])
    assert len(answer.content) / 2 / 24000 == pytest.approx(seconds, abs=0.001)


@shipped
def test_audio_arrives_while_frames_are_being_decoded(worker: WorkerProcess) -> None:
    """After the first bytes, the worker's health shows the request as running."""
    served = worker.health()["served"]
    body = {"input": " ".join([SENTENCE] * 8), "response_format": "pcm"}
    with worker.client.stream("POST", "/v1/audio/speech", json=body) as answer:
        assert answer.headers["x-accel-buffering"] == "no"
        chunks = answer.iter_raw()
        assert next(chunks)
        health = worker.health()
        assert (health["running"], health["served"]) == (1, served)
        assert sum(1 for _ in chunks) > 8
    eventually(lambda: worker.health()["served"] == served + 1, "the end of the request")


LONG = {
    "characters": (SENTENCE + " ") * 223,
    "digits": "7" * 10_000,
    "word": "x" * 4096,
}


@shipped
@pytest.mark.parametrize("name", LONG)
def test_a_disconnect_during_long_speech_frees_the_worker(worker: WorkerProcess, name: str) -> None:
    body = {"input": LONG[name][:2_000], "response_format": "pcm"}
    before = frames(worker)
    with worker.client.stream("POST", "/v1/audio/speech", json=body) as answer:
        assert answer.status_code == 200
        assert next(answer.iter_raw())
    eventually(lambda: worker.running_and_waiting() == (0, 0), "the end of the request")
    eventually(lambda: frames(worker) > before, "a fresh report")
    # All of it is minutes of speech at 40 frames a second.
    assert frames(worker) - before < 3000
    assert speak(worker, response_format="wav").status_code == 200


@shipped
@pytest.mark.parametrize("response_format", ["pcm", "wav"])
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"input": ""}, "empty"),
        ({"input": "🎉🚀"}, "letters or digits"),
        ({"input": "Hi.", "temperature": 9}, "temperature = 9"),
        ({"input": "Hi.", "top_p": "most"}, "top_p = 'most'"),
        ({"input": "Hi.", "repetition_penalty": 0}, "repetition_penalty = 0"),
        ({"input": "Hi.", "speed": 9}, "speed"),
        ({"input": "Hi.", "voice": "zoe"}, "slt"),
    ],
)
def test_unspeakable_input_gets_a_clear_error(
    worker: WorkerProcess, response_format: str, body: dict[str, Any], said: str
) -> None:
    answer = worker.client.post(
        "/v1/audio/speech", json={**body, "response_format": response_format}
    )
    assert answer.status_code == (404 if "voice" in body else 400)
    assert said in answer.json()["error"]["message"]


@shipped
@pytest.mark.parametrize("text", ["42", "a", "U.S.", "$1.50 at 10:05", "Ω1", "naïve café"])
def test_short_and_odd_input_is_spoken(worker: WorkerProcess, text: str) -> None:
    answer = speak(worker, text, response_format="wav")
    assert answer.status_code == 200
    assert len(answer.content) > 44 + 2 * 1600


@shipped
def test_health_reports_what_runs(worker: WorkerProcess) -> None:
    health = worker.health()
    assert health["device"] == "cpu"
    assert health["dtype"] == "float32"
    assert health["engine"] == "eager"
    assert health["provider"] == "cpu"
    assert set(health["codec_decoder"]["nodes"]) == {"cpu"}
    assert health["codec_decoder"]["nodes"]["cpu"] > 10
    assert worker.client.get("/v1/audio/voices").json() == {"voices": ["slt"]}
    json.dumps(health, allow_nan=False)


def fails(folder: Path, args: dict[str, Any]) -> str:
    """Return the one log line of a worker that fails to load."""
    worker = WorkerProcess(folder, TARGET, args, environment=ONE_THREAD)
    try:
        assert worker.wait() == 1, worker.log  # a file or a device may be there at the next start
        (line,) = worker.lines
        return line
    finally:
        worker.__exit__()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = write_voice(tmp_path / "voice")
    (folder / "pitch.safetensors").unlink()
    assert str(folder / "pitch.safetensors") in fails(tmp_path, {"weights": str(folder)})


def test_an_invalid_graph_is_named(tmp_path: Path) -> None:
    folder = write_voice(tmp_path / "voice")
    assert str(folder / "codec_decoder.onnx") in fails(tmp_path, {"weights": str(folder)})


@shipped
@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
    reason="this onnxruntime has GPU providers",
)
def test_a_missing_required_provider_fails_the_start(tmp_path: Path) -> None:
    line = fails(tmp_path, {"weights": str(FOLDER), "require": "gpu"})
    for part in ('require = "gpu"', "tensorrt: ", "cuda: ", "onnxruntime-gpu"):
        assert part in line


def test_a_setting_out_of_range_fails_the_start(tmp_path: Path) -> None:
    assert "temperature = 9" in fails(tmp_path, {"temperature": 9})
