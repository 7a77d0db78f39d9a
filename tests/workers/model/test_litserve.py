"""LitServe's LitAPI, unchanged, with LitServe itself installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from litserve.loops import LitLoop
from litserve.specs.openai import OpenAISpec

from tests.workers.harness import WorkerProcess
from workers.errors import LoadError
from workers.model.loader import load
from workers.model.spec import Spec

EXAMPLES = "litserve.test_examples.simple_example"


def lit(folder: Path, name: str, **args: Any) -> WorkerProcess:
    # litserve's own imports may warn, so this worker does not make errors of warnings
    return WorkerProcess(folder, f"tests.workers.models.lit:{name}", args, warnings="ignore")


class OwnLoop(LitLoop):  # type: ignore[misc]
    """Not run."""


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_hooks_are_called(tmp_path: Path) -> None:
    with lit(tmp_path, "Square") as worker:
        answer = worker.predict({"input": 4.0})
        assert answer.json() == {"output": 16.0, "device": "cpu", "known": "cpu"}
        refused = worker.predict({"input": "refuse"})
        assert refused.status_code == 422
        assert refused.json()["error"]["message"] == "not this one"
        assert worker.predict({}).status_code == 500
        assert worker.health()["healthy"] is True
        assert "model log squared=4.0" in worker.log


def test_typed_requests_and_context(tmp_path: Path) -> None:
    with lit(tmp_path, "Typed") as worker:
        assert worker.predict({"number": 4}).json() == {"number": 8}
        refused = worker.predict({"number": "x"})
        assert refused.status_code == 400
        assert "number" in refused.json()["error"]["message"]


def test_values_are_json_and_responses_are_unchanged(tmp_path: Path) -> None:
    with lit(tmp_path, "Plain") as worker:
        answer = worker.predict({"word": "hello"})
        assert answer.json() == "hello"
        picture = worker.predict({"word": "picture"})
        assert picture.headers["content-type"] == "image/png"
        assert picture.headers["x-kind"] == "drawn"
        assert picture.content == b"\x89PNG"


def test_streams_keep_the_models_framing(tmp_path: Path) -> None:
    with lit(tmp_path, "Words", stream=True) as worker:
        answer = worker.predict({"text": "one two json"})
        assert answer.text == 'one two {"word": "json"}\n'


def test_api_path_is_served(tmp_path: Path) -> None:
    with lit(tmp_path, "Moved") as worker:
        assert worker.client.post("/v1/words", json={"word": "a"}).json() == "a"
        assert worker.predict({"word": "a"}).json() == "a"


def test_forms(tmp_path: Path) -> None:
    with lit(tmp_path, "Form") as worker:
        answer = worker.client.post("/predict", files={"file": ("a.txt", b"12345")})
        assert answer.json() == {"name": "a.txt", "size": 5}
        broken = {"content-type": "multipart/form-data; boundary=a"}
        answer = worker.client.post("/predict", content=b"no form", headers=broken)
        assert answer.status_code == 400
        assert "The body is not a valid form: Invalid" in answer.json()["error"]["message"]


def test_uploaded_file_as_in_litserve(tmp_path: Path) -> None:
    large = b"x" * (2 * 2**20)  # more than is kept in memory
    with lit(tmp_path, "Upload") as worker:
        answer = worker.client.post("/predict", files={"request": ("a.txt", b"12345")})
        assert answer.json() == {"name": "a.txt", "text": "12345"}
        answer = worker.client.post("/predict", files={"request": ("b.txt", large)})
        assert len(answer.json()["text"]) == len(large)
        for answer in (
            worker.client.post("/predict", files={"other": ("a.txt", b"1")}),
            worker.predict({}),
        ):
            assert answer.status_code == 400
            assert "no file in its field 'request'" in answer.json()["error"]["message"]
    with lit(tmp_path, "UploadPlainly") as worker:
        answer = worker.client.post("/predict", files={"request": ("b.txt", large)})
        assert answer.json() == {"size": len(large)}


def test_other_annotations_are_validated_by_pydantic(tmp_path: Path) -> None:
    with lit(tmp_path, "Listed") as worker:
        assert worker.predict([1, 2]).json() == {"sum": 3}
        assert worker.predict({"a": 1}).status_code == 400


def test_streaming_hooks_stream_without_stream_set(tmp_path: Path) -> None:
    with lit(tmp_path, "Words") as worker:
        assert worker.predict({"text": "one two json"}).text == 'one two {"word": "json"}\n'
    with lit(tmp_path, "Joined") as worker:
        assert worker.predict({"text": "one two"}).json() == {"text": "one+two"}


@pytest.mark.parametrize("args", [{}, {"enable_async": True}])
def test_async_hooks(tmp_path: Path, args: dict[str, Any]) -> None:
    with lit(tmp_path, "Asynchronous", **args) as worker:
        for number in (1, 2):
            answer = worker.predict(number)
            assert answer.json() == {"output": number, "context": number, "device": "cpu"}
        assert worker.predict("refuse").status_code == 422
        assert worker.health()["healthy"] is False


@pytest.mark.parametrize(
    ("name", "args", "text"),
    [
        ("AsyncWords", {}, "one two "),
        ("AsyncWords", {"stream": True}, "one two "),
        ("AsyncWords", {"stream": True, "enable_async": True}, "one two "),
        ("HalfAsyncWords", {}, "one_two_"),
    ],
)
def test_async_streams(tmp_path: Path, name: str, args: dict[str, Any], text: str) -> None:
    with lit(tmp_path, name, **args) as worker:
        assert worker.predict({"text": "one two"}).text == text


def test_each_request_is_a_batch_of_one(tmp_path: Path) -> None:
    with lit(tmp_path, "Batched", max_batch_size=4, batch_timeout=0.1) as worker:
        assert worker.predict({"input": 4.0}).json() == {"output": 8.0}
        assert "written for batches" in worker.log


@pytest.mark.parametrize("args", [{}, {"max_batch_size": 4, "stream": True}])
def test_batched_streams(tmp_path: Path, args: dict[str, Any]) -> None:
    with lit(tmp_path, "BatchedStream", **args) as worker:
        lines = worker.predict({"prompt": "hi"}).text.splitlines()
    assert [json.loads(line) for line in lines] == [{"output": f"{n}: hi"} for n in range(3)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("SimpleLitAPI", '{"output":16.0}'),
        ("SimpleBatchedAPI", '{"output":16.0}'),
        ("SimpleTorchAPI", '{"output":9.0}'),
        ("SimpleStreamAPI", "".join(f'{{"output": "{n}: 4.0"}}\n' for n in range(3))),
    ],
)
def test_litserves_own_examples(tmp_path: Path, name: str, text: str) -> None:
    with WorkerProcess(tmp_path, f"{EXAMPLES}:{name}", warnings="ignore") as worker:
        for _ in range(2):
            answer = worker.predict({"input": 4.0})
            assert answer.status_code == 200
            assert answer.text == text


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("Square", {"loop": OwnLoop()}, "Square.loop is not supported: OwnLoop"),
        ("Query", {}, "annotation of request is not supported: str, which LitServe reads"),
        ("NoPredict", {}, "NoPredict has no predict(x)"),
        ("WrongHook", {}, "decode_request() cannot be called as decode_request(request)"),
    ],
)
def test_unsupported_litapi_is_rejected_at_the_start(
    executor: ThreadPoolExecutor, name: str, args: dict[str, Any], words: str
) -> None:
    with pytest.raises(LoadError) as error:
        load(Spec(target=f"tests.workers.models.lit:{name}", args=args), "cpu", executor)
    assert words in str(error.value)


def test_litserve_spec_is_rejected(executor: ThreadPoolExecutor) -> None:
    spec = Spec(target="tests.workers.models.lit:Square", args={"spec": OpenAISpec()})
    with pytest.raises(LoadError, match="remove it, a worker serves"):
        load(spec, "cpu", executor)
