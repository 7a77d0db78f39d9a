"""LitServe's LitAPI, unchanged. Runs where its users have it installed."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.workers_harness import WorkerProcess
from workers.errors import LoadError
from workers.served import load
from workers.spec import Spec

pytest.importorskip("litserve")


def lit(folder: Path, name: str, **args: Any) -> WorkerProcess:
    # litserve's own imports may warn, so this worker does not make errors of warnings
    return WorkerProcess(folder, f"tests.models.lit:{name}", args, warnings="ignore")


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_its_hooks_are_called(tmp_path: Path) -> None:
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


def test_bare_values_are_json_and_responses_leave_as_they_are(tmp_path: Path) -> None:
    with lit(tmp_path, "Plain") as worker:
        answer = worker.predict({"word": "hello"})
        assert answer.json() == "hello"
        picture = worker.predict({"word": "picture"})
        assert picture.headers["content-type"] == "image/png"
        assert picture.headers["x-kind"] == "drawn"
        assert picture.content == b"\x89PNG"


def test_streams_leave_as_they_are_framed(tmp_path: Path) -> None:
    with lit(tmp_path, "Words", stream=True) as worker:
        answer = worker.predict({"text": "one two json"})
        assert answer.text == 'one two {"word": "json"}\n'


def test_its_own_path_is_served_too(tmp_path: Path) -> None:
    with lit(tmp_path, "Moved") as worker:
        assert worker.client.post("/v1/words", json={"word": "a"}).json() == "a"
        assert worker.predict({"word": "a"}).json() == "a"


def test_forms(tmp_path: Path) -> None:
    with lit(tmp_path, "Form") as worker:
        answer = worker.client.post("/predict", files={"file": ("a.txt", b"12345")})
        if importlib.util.find_spec("python_multipart"):
            assert answer.json() == {"name": "a.txt", "size": 5}
        else:
            assert answer.status_code == 415
            assert "python-multipart" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("Square", {"max_batch_size": 4}, "max_batch_size=4"),
        ("Asynchronous", {"enable_async": True}, "enable_async=True"),
    ],
)
def test_what_one_request_at_a_time_cannot_honour_is_refused(
    executor: ThreadPoolExecutor, name: str, args: dict[str, Any], words: str
) -> None:
    spec = Spec(target=f"tests.models.lit:{name}", args=args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # litserve's, about hooks that are not asynchronous
        with pytest.raises(LoadError) as error:
            load(spec, "cpu", executor)
    assert words in str(error.value)


def test_a_spec_is_refused(executor: ThreadPoolExecutor) -> None:
    from litserve.specs.openai import OpenAISpec

    spec = Spec(target="tests.models.lit:Square", args={"spec": OpenAISpec()})
    with pytest.raises(LoadError, match="leave spec out"):
        load(spec, "cpu", executor)
