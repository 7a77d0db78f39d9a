"""LitServe's own kind of model, as its users write it."""

# mypy: ignore-errors
# (litserve and fastapi are where their users have them)

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import litserve as ls
from fastapi import HTTPException
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


class Asynchronous(ls.LitAPI):
    async def predict(self, x: Any) -> Any:
        await asyncio.sleep(0)
        return x
