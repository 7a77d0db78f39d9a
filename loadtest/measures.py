"""Rows of Locust's own table, CSV and page for what a farm reports beside latency.

They are logged beside the requests, not as requests: "Aggregated" stays the latency of requests
that were answered or failed. Locust's workers send such rows to its master like any other.
Every value is in milliseconds, as Locust's columns say; a factor is shown in thousandths, which are
milliseconds per second of audio.
"""

from __future__ import annotations

from typing import Any

from loadtest.samples import OK, REFUSED, UNFINISHED, Sample

AUDIO = "audio seconds made (RPS column: audio seconds per second)"
INFERENCE = "inference time (ms)"
QUEUE = "queue time (ms)"
FIRST_AUDIO = "time to first audio (ms)"
FACTOR = "real-time factor x 1000 (inference ms per audio second)"
CALLER_FACTOR = "real-time factor x 1000, waiting included (latency ms per audio second)"
REFUSED_ROW = "refused, 429 (ms until the response)"
UNFINISHED_ROW = "unfinished when the run ended (ms waited so far)"

STREAM = "stream"


class Measures:
    """Logs samples as rows of ``stats``, a locust.stats.RequestStats."""

    def __init__(self, stats: Any) -> None:
        self._stats = stats
        self._audio: dict[str, float] = {}
        """Seconds of each kind that do not make up a whole second yet."""

    def log(self, sample: Sample) -> None:
        kind = sample.kind
        if sample.outcome == REFUSED:
            self._value(REFUSED_ROW, kind, sample.latency_ms)
        elif sample.outcome == UNFINISHED:
            self._value(UNFINISHED_ROW, kind, sample.latency_ms)
        if sample.outcome != OK:
            return
        self._value(QUEUE, kind, sample.queue_ms)
        self._value(INFERENCE, kind, sample.inference_ms)
        self._value(FACTOR, kind, _thousandfold(sample.real_time_factor))
        self._value(CALLER_FACTOR, kind, _thousandfold(sample.caller_factor))
        if kind == STREAM:
            self._value(FIRST_AUDIO, kind, sample.first_byte_ms)
        if sample.audio_seconds is not None:
            self._count_audio(kind, sample.audio_seconds)

    def _value(self, name: str, kind: str, value: float | None) -> None:
        if value is not None:
            self._stats.entries[name, kind].log(value, 0)

    def _count_audio(self, kind: str, seconds: float) -> None:
        """A "request" of this row is one second of audio: its rate is what its name says."""
        whole, rest = divmod(self._audio.get(kind, 0.0) + seconds, 1)
        self._audio[kind] = rest
        entry = self._stats.entries[AUDIO, kind]
        for _ in range(int(whole)):
            entry.log(None, 0)


def _thousandfold(factor: float | None) -> float | None:
    return None if factor is None else 1000 * factor


def bucket(milliseconds: float) -> int:
    """Three significant digits; Locust's own two would be 5 % wrong for a p95 threshold."""
    value = round(milliseconds)
    digits = 3 - len(str(abs(value)))
    return value if digits >= 0 else int(round(value, digits))
