"""The contract of a model: the classes that a user writes, and the arguments they get.

A model is any class with ``setup(device)`` and ``predict(request)``, or, for speech, ``speak``.
No base class is needed; the protocols below document the contract and let mypy check it. Every
method may be ``async def`` or an async generator: it runs to its end on the device thread, on one
event loop for the life of the worker, and still one request at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from workers.errors import Cancelled, InvalidRequest

if TYPE_CHECKING:  # a model that does not speak is served without numpy
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "Audio",
    "Cancelled",
    "InvalidRequest",
    "Model",
    "SpeechModel",
    "SpeechRequest",
    "Work",
]

Audio: TypeAlias = "NDArray[np.float32]"
"""Mono samples in [-1, 1], shape (samples,)."""


class Work:
    """One request on the device thread: whether it is cancelled, and the time of its stages."""

    def __init__(self, deadline: float | None = None) -> None:
        """``deadline``: a ``time.monotonic()`` value, or None for no limit."""
        self.deadline = deadline
        self.stages: dict[str, float] = {}
        """Seconds spent in each stage so far."""
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Cancel the request. Called from the event loop."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set() or (
            self.deadline is not None and time.monotonic() > self.deadline
        )

    def check(self) -> None:
        """Raise Cancelled where the request is cancelled or late. Cheap: call it every step."""
        if self.cancelled:
            raise Cancelled

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to the stage ``name``."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - begun


@dataclass(frozen=True)
class SpeechRequest:
    """A validated ``/v1/audio/speech`` request, as a speech model gets it."""

    input: str
    voice: str
    """One of the model's ``voices``: ``default`` and aliases are already resolved."""
    speed: float = 1.0
    """0.25 to 4; 2 is twice as fast."""
    seed: int | None = None
    """The same seed and text give the same samples; None leaves the choice to the model."""
    instructions: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """All other fields of the body, not validated."""
    work: Work = field(default_factory=Work)


class Model(Protocol):
    """A model served at ``/predict``.

    Optional: ``warm_up()``, called once after ``setup`` and before the port opens;
    ``health()``, a JSON-ready dict of what is actually in use (device, dtype, engine, provider);
    ``longest_request()``, what sizing sends to measure the footprint:
    ``{"path": "/predict", "json": {...}}``.
    """

    def setup(self, device: str) -> None:
        """Load onto ``device``: ``"cuda:0"`` or ``"cpu"``."""

    def predict(self, request: Any) -> Any:
        """``request`` is parsed JSON, or bytes for any other content type (a JSON object or list
        that comes without one, as from plain `curl -d`, is parsed as well).

        Return a JSON-ready value, bytes or str; or yield those (a stream). What JSON cannot carry
        (NaN, a set, bytes within a dict) is a 500 that says what it was and where.
        """


class SpeechModel(Protocol):
    """A model served at ``/v1/audio/speech``. The optional methods are those of Model."""

    sample_rate: int
    """Hz of what ``speak`` yields. pcm is sent at 24,000 Hz whatever this is."""
    voices: list[str]
    """The first one is the default. A single one also accepts all of OpenAI's voice names."""

    def setup(self, device: str) -> None:
        """Load onto ``device``: ``"cuda:0"`` or ``"cpu"``."""

    def speak(self, request: SpeechRequest) -> Iterator[Audio]:
        """Yield the speech in chunks, in order. Raise InvalidRequest for what cannot be spoken."""
