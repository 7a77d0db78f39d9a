"""A model of /v1/audio/speech: it hums, a tenth of a second for each character."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import soundfile

from workers.model.contract import Audio, InvalidRequest, SpeechRequest


class AsyncHum:
    sample_rate = 24000
    voices = ["low"]  # noqa: RUF012

    async def setup(self, device: str) -> None:
        pass

    async def speak(self, request: SpeechRequest) -> AsyncIterator[Audio]:
        for _ in request.input:
            request.work.check()
            await asyncio.sleep(0)
            yield np.full(2400, 0.1, np.float32)


class Hum:
    voices = ["low", "high"]  # noqa: RUF012

    def __init__(self, sample_rate: int = 16000, journal: str = "") -> None:
        self.sample_rate = sample_rate
        self.journal = Path(journal) if journal else None

    def setup(self, device: str) -> None:
        self.device = device

    def speak(self, request: SpeechRequest) -> Iterator[Audio]:
        if request.input == "unspeakable":
            raise InvalidRequest("this cannot be spoken")
        pitch = 220 if request.voice == "low" else 440
        length = int(self.sample_rate * 0.1 / request.speed)
        times = np.arange(length, dtype=np.float32) / self.sample_rate
        gate = request.extra.get("gate")
        try:
            for index, character in enumerate(request.input):
                if character == "!":
                    raise RuntimeError("the secret of the model")
                with request.work.stage("decoder"):
                    chunk = 0.3 * np.sin(2 * np.pi * pitch * times)
                yield chunk.astype(np.float32)
                while gate and index == 0 and not Path(gate).exists():
                    request.work.check()
                    time.sleep(0.01)
        finally:
            if self.journal is not None:
                with self.journal.open("a") as file:
                    file.write("closed\n")


class Steady(Hum):
    """Takes a fixed time for a request, and for each character."""

    def __init__(self, fixed: float, each: float) -> None:
        super().__init__()
        self.fixed, self.each = fixed, each

    def speak(self, request: SpeechRequest) -> Iterator[Audio]:
        time.sleep(self.fixed + self.each * len(request.input))
        yield np.zeros(160, np.float32)


class BrokenEncoder(Hum):
    """Hums where the library that compresses audio fails."""

    def setup(self, device: str) -> None:
        super().setup(device)
        soundfile.SoundFile.write = _fails


def _fails(*_: object) -> None:
    raise OSError(28, "No space left on device")
