"""Models that fail to start."""

from __future__ import annotations

from typing import Any


class NoSetup:
    def predict(self, request: Any) -> Any:
        return request


class NoPredict:
    def setup(self, device: str) -> None:
        pass


class Arguments(NoPredict):
    def __init__(self, size: int, name: str = "x") -> None:
        pass

    def predict(self, request: Any) -> Any:
        return request


class ConstructorFails(NoPredict):
    def __init__(self) -> None:
        raise ConnectionError("the hub does not answer")

    def predict(self, request: Any) -> Any:
        return request


class SetupFails(NoSetup):
    def setup(self, device: str) -> None:
        raise FileNotFoundError("weights.safetensors is missing\nsecond line")


class WarmUpFails(NoSetup):
    def setup(self, device: str) -> None:
        pass

    def warm_up(self) -> None:
        raise RuntimeError("no kernel image for this device")


class HealthFails(NoSetup):
    def setup(self, device: str) -> None:
        pass

    def health(self) -> Any:
        return []


class LongestFails(NoSetup):
    def setup(self, device: str) -> None:
        pass

    def longest_request(self) -> Any:
        return "the longest"


class Exits(NoSetup):
    def setup(self, device: str) -> None:
        raise SystemExit(0)


class NoVoices:
    sample_rate = 16000
    voices: list[str] = []  # noqa: RUF012

    def setup(self, device: str) -> None:
        pass

    def speak(self, request: Any) -> Any:
        return iter(())


NOT_A_CLASS = 3


class OutOfMemory:
    """As torch reports it while another process still holds the memory."""

    def setup(self, device: str) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def predict(self, request: Any) -> Any:
        return request


class PredictWithoutRequest:
    def setup(self, device: str) -> None:
        raise AssertionError("found before anything is loaded")

    def predict(self) -> Any:
        return None


class SetupWithoutDevice:
    def setup(self) -> None:
        pass

    def predict(self, request: Any) -> Any:
        return request


class SpeakWithTwo:
    sample_rate = 16000
    voices = ["a"]  # noqa: RUF012

    def setup(self, device: str) -> None:
        pass

    async def speak(self, text: str, voice: str) -> Any:
        yield text + voice


class HealthWithArgument(NoSetup):
    def setup(self, device: str) -> None:
        pass

    def health(self, verbose: bool) -> Any:
        return {"verbose": verbose}


class PredictIsData:
    predict = 3

    def setup(self, device: str) -> None:
        pass


class AsyncSetupFails(NoSetup):
    async def setup(self, device: str) -> None:
        raise FileNotFoundError("weights.safetensors is missing")
