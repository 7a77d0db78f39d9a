"""The state that all routes of a worker share."""

from __future__ import annotations

import time
from concurrent.futures import Executor
from dataclasses import dataclass, field

from workers.http.metrics import Metrics
from workers.model.loader import LoadedModel
from workers.model.spec import Spec
from workers.queueing.queue import RequestQueue
from workers.queueing.speech_rate import SpeechRate


@dataclass
class WorkerState:
    """One process with one model, one port, and one thread for its device."""

    id: str
    spec: Spec
    loaded: LoadedModel
    device_thread: Executor
    encoder_thread: Executor
    """Compresses audio, so that neither the device nor the event loop waits for it."""
    queue: RequestQueue
    metrics: Metrics
    speech_rate: SpeechRate = field(default_factory=SpeechRate)
    draining: bool = False
    started: float = field(default_factory=time.time)
    """Unix time."""
