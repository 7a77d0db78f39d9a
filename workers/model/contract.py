"""What a model is to a worker: the classes a user writes, and what they are called with.

A model is any class with ``setup(device)`` and ``predict(request)``, or, for speech, ``speak``.
Nothing has to be inherited; the protocols below state the contract for readers and for mypy.
Every method may be ``async def``, and yield as an async generator: it is run to its end on the
device thread, on one event loop for the life of the worker, and still one request at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from workers.errors import Cancelled, InvalidRequest

__all__ = [
    "Audio",
    "Cancelled",
    "InvalidRequest",
    "Model",
    "SpeechModel",
    "SpeechRequest",
    "Work",
]

Audio = NDArray[np.float32]
"""Mono samples in [-1, 1], shape (samples,)."""


class Work:
    """One request's life on the device thread: is it still wanted, and where did the time go."""

    def __init__(self, deadline: float | None = None) -> None:
        """``deadline``: a ``time.monotonic()`` value, or None for no limit."""
        self.deadline = deadline
        self.stages: dict[str, float] = {}
        """Seconds spent in each stage so far."""
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """The caller has left. Called from the event loop."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set() or (
            self.deadline is not None and time.monotonic() > self.deadline
        )

    def check(self) -> None:
        """Raise Cancelled when nobody waits for the result any more. Cheap: call it every step."""
        if self.cancelled:
            raise Cancelled

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of the block towards the stage ``name``."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - begun


@dataclass(frozen=True)
class SpeechRequest:
    """A validated ``/v1/audio/speech`` request, as a speech model sees it."""

    input: str
    voice: str
    """One of the model's ``voices``; ``default`` has already been resolved to the first."""
    speed: float = 1.0
    """0.25 to 4; 2 is twice as fast."""
    seed: int | None = None
    """The same seed and text give the same samples; None leaves the choice to the model."""
    instructions: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """Every other field of the body, unchecked: the model reads those it knows."""
    work: Work = field(default_factory=Work)


class Model(Protocol):
    """A model served at ``/predict``.

    Optional: ``warm_up()``, called once after ``setup`` and before the port opens;
    ``health()``, a JSON-ready dict of what is really in use (device, dtype, engine, provider);
    ``longest_request()``, what sizing sends to measure the footprint:
    ``{"path": "/predict", "json": {...}}``.
    """

    def setup(self, device: str) -> None:
        """Load onto ``device``: ``"cuda:0"`` or ``"cpu"``."""

    def predict(self, request: Any) -> Any:
        """``request`` is parsed JSON, or bytes for any other content type (a JSON object or list
        that comes without one, as from plain `curl -d`, is parsed as well).

        Returns a JSON-ready value, bytes or str; or yields those (a stream). What JSON cannot
        carry (NaN, a set, bytes within a dict) is answered with 500 and says what it was and where.
        """


class SpeechModel(Protocol):
    """A model served at ``/v1/audio/speech``. The optional methods are those of Model."""

    sample_rate: int
    """Hz of what ``speak`` yields. pcm leaves at 24,000 Hz whatever this is."""
    voices: list[str]
    """The first one is the default. A single one also answers to every voice name of OpenAI's."""

    def setup(self, device: str) -> None:
        """Load onto ``device``: ``"cuda:0"`` or ``"cpu"``."""

    def speak(self, request: SpeechRequest) -> Iterator[Audio]:
        """Yield the speech in chunks, in order. Raise InvalidRequest for what cannot be spoken."""
