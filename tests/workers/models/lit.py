"""LitAPIs as users of LitServe write them."""

# mypy: ignore-errors
# (written as their users would)

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import litserve as ls
import numpy as np
from fastapi import HTTPException, UploadFile
from fastapi.responses import Response
from pydantic import BaseModel


class Square(ls.LitAPI):
    def setup(self, device: str) -> None:
        self.model = lambda x: x**2
        self.given = device

    def decode_request(self, request: dict[str, Any]) -> Any:
        if request["input"] == "refuse":
            raise HTTPException(status_code=422, detail="not this one")
        return request["input"]

    def predict(self, x: Any) -> Any:
        self.log("squared", x)
        return self.model(x)

    def encode_response(self, output: Any) -> Any:
        return {"output": output, "device": self.given, "known": self.device}


class Body(BaseModel):
    number: int


class Typed(ls.LitAPI):
    def decode_request(self, request: Body, context: dict[str, Any]) -> int:
        context["number"] = request.number
        return request.number

    def predict(self, x: int, context: dict[str, Any]) -> Any:
        return Body(number=x + context["number"])


class Plain(ls.LitAPI):
    def predict(self, x: Any) -> Any:
        return x["word"]

    def encode_response(self, output: Any) -> Any:
        if output == "picture":
            return Response(b"\x89PNG", media_type="image/png", headers={"X-Kind": "drawn"})
        return output


class Words(ls.LitAPI):
    def predict(self, x: dict[str, Any]) -> Iterator[str]:
        yield from x["text"].split()

    def encode_response(self, output: Iterator[str]) -> Iterator[Any]:
        for word in output:
            yield word + " " if word != "json" else {"word": word}


class Moved(Plain):
    def __init__(self) -> None:
        super().__init__(api_path="/v1/words")


class Form(ls.LitAPI):
    def predict(self, x: Any) -> Any:
        return {"name": x["file"].filename, "size": len(x["file"].file.read())}


class Upload(ls.LitAPI):
    async def decode_request(self, request: UploadFile) -> Any:
        return {"name": request.filename, "text": (await request.read()).decode()}

    def predict(self, x: Any) -> Any:
        return x


class UploadPlainly(ls.LitAPI):
    def decode_request(self, request: UploadFile) -> Any:
        return len(request.file.read())

    def predict(self, x: Any) -> Any:
        return {"size": x}


class Listed(ls.LitAPI):
    def decode_request(self, request: list[int]) -> Any:
        return sum(request)

    def predict(self, x: int) -> Any:
        return {"sum": x}


class Query(ls.LitAPI):
    def decode_request(self, request: str) -> Any:
        return request

    def predict(self, x: Any) -> Any:
        return x


class Asynchronous(ls.LitAPI):
    async def setup(self, device: str) -> None:
        self.known = device

    async def decode_request(self, request: Any) -> Any:
        await asyncio.sleep(0)
        if request == "refuse":
            raise HTTPException(status_code=422, detail="not this one")
        return request

    async def predict(self, x: Any, context: dict[str, Any]) -> Any:
        await asyncio.sleep(0)
        context["x"] = x
        return x

    async def encode_response(self, output: Any, context: dict[str, Any]) -> Any:
        await asyncio.sleep(0)
        return {"output": output, "context": context["x"], "device": self.known}

    async def health(self) -> bool:
        return False


class AsyncWords(ls.LitAPI):
    async def predict(self, x: dict[str, Any]) -> AsyncIterator[str]:
        for word in x["text"].split():
            await asyncio.sleep(0)
            yield word

    async def encode_response(self, output: AsyncIterator[str]) -> AsyncIterator[Any]:
        async for word in output:
            yield word + " "


class HalfAsyncWords(AsyncWords):
    def encode_response(self, output: Iterator[str]) -> Iterator[Any]:
        for word in output:
            yield word + "_"


class Joined(ls.LitAPI):
    """Yields from predict, and answers whole."""

    def predict(self, x: dict[str, Any]) -> Iterator[str]:
        yield from x["text"].split()

    def encode_response(self, output: Iterator[str]) -> Any:
        return {"text": "+".join(output)}


class Batched(ls.LitAPI):
    """As LitServe's examples of dynamic batching are written."""

    def decode_request(self, request: dict[str, Any]) -> Any:
        return np.asarray(request["input"])

    def predict(self, x: Any) -> Any:
        assert x.shape[0] == 1
        return x * 2

    def encode_response(self, output: Any) -> Any:
        return {"output": output}


class BatchedStream(ls.LitAPI):
    """As LitServe's example of batched streaming is written."""

    def decode_request(self, request: dict[str, Any]) -> Any:
        return request["prompt"]

    def batch(self, inputs: list[str]) -> Any:
        return np.asarray(inputs)

    def predict(self, x: Any) -> Iterator[Any]:
        for number in range(3):
            yield [f"{number}: {prompt}" for prompt in x]

    def encode_response(self, output: Iterator[Any]) -> Iterator[Any]:
        for batch in output:
            yield [{"output": one} for one in batch]


class NoPredict(ls.LitAPI):
    pass


class WrongHook(ls.LitAPI):
    def decode_request(self) -> Any:
        return None

    def predict(self, x: Any) -> Any:
        return x
