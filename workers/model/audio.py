"""Encode speech in the formats of OpenAI's contract, complete or as a stream."""

from __future__ import annotations

import io
import struct
from typing import Any, Protocol

import numpy as np
import soundfile

from workers.model.contract import Audio
from workers.model.resampling import Resampler

CONTENT_TYPES = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}
"""The supported formats."""

PROGRESSIVE = frozenset({"pcm", "wav", "mp3", "opus"})
"""Formats that stay readable when their first bytes are sent before the last are known.

flac has its length and checksum in its header, and soundfile does not read it without them. A
streamed wav declares "read to the end" in place of its length, as OpenAI's own does: players accept
that, but some show no duration.
"""

_RATES = {
    "pcm": (24000,),  # it has no header for another rate, and OpenAI's clients play it at this one
    "opus": (8000, 12000, 16000, 24000, 48000),
    "mp3": (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000),
}
_UNKNOWN = 0xFFFFFFFF
"""The length in a wav header that means: read to the end."""


class Encoder(Protocol):
    """Takes chunks in order. What ``feed`` and ``finish`` return, joined, is the file."""

    def feed(self, chunk: Audio) -> bytes: ...

    def finish(self) -> bytes: ...


def samples(chunk: Any) -> Audio:
    """Convert a chunk that a model yielded to finite float32 mono, shape (samples,).

    Raises ValueError or TypeError.
    """
    if hasattr(chunk, "detach"):  # a torch tensor, perhaps on a GPU
        chunk = chunk.detach().float().cpu().numpy()
    array = np.asarray(chunk)
    if array.dtype.kind != "f":
        raise TypeError(f"audio chunk must be float32 in [-1, 1], got {array.dtype}")
    audio = array.astype(np.float32, copy=False)
    if audio.ndim != 1:
        audio = audio.squeeze()
        if audio.ndim != 1:
            raise ValueError(f"audio chunk must be mono, got shape {array.shape}")
    if not np.isfinite(audio).all():
        raise ValueError("audio chunk must be finite, got NaN or infinity")
    return audio


def encode(chunks: list[Audio], rate: int, format_name: str) -> bytes:
    """Return a complete file with its true length in the header."""
    if format_name == "wav":
        body = b"".join(to_pcm(chunk) for chunk in chunks)
        return wav_header(rate, len(body)) + body
    writer = encoder(rate, format_name, complete=True)
    return b"".join([*(writer.feed(chunk) for chunk in chunks), writer.finish()])


def encoder(rate: int, format_name: str, complete: bool = False) -> Encoder:
    """Create an encoder. ``complete``: return everything at the end, with all lengths set."""
    if format_name == "pcm":
        return _Pcm(rate)
    if format_name == "wav":
        return _Wav(rate)
    return _Compressed(rate, format_name, complete or format_name not in PROGRESSIVE)


def to_pcm(chunk: Audio) -> bytes:
    """Convert to signed 16-bit little-endian samples."""
    return (np.clip(chunk, -1.0, 1.0) * 32767.0).round().astype("<i2").tobytes()


def wav_header(rate: int, size: int | None) -> bytes:
    """Return the 44-byte header for 16-bit mono. ``size``: bytes of samples, None if unknown."""
    data = _UNKNOWN if size is None else size
    riff = _UNKNOWN if size is None else 36 + size
    head = struct.pack("<4sI4s", b"RIFF", riff, b"WAVE")
    layout = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, rate * 2, 2, 16)
    return head + layout + struct.pack("<4sI", b"data", data)


class _Pcm:
    def __init__(self, rate: int) -> None:
        target = writable_rate(rate, "pcm")
        self._resampler = Resampler(rate, target) if target != rate else None

    def feed(self, chunk: Audio) -> bytes:
        return to_pcm(chunk if self._resampler is None else self._resampler.feed(chunk))

    def finish(self) -> bytes:
        return b"" if self._resampler is None else to_pcm(self._resampler.finish())


class _Wav:
    def __init__(self, rate: int) -> None:
        self._head = wav_header(rate, None)

    def feed(self, chunk: Audio) -> bytes:
        head, self._head = self._head, b""
        return head + to_pcm(chunk)

    def finish(self) -> bytes:
        return self._head


class _Compressed:
    """mp3, opus and flac, written by soundfile."""

    def __init__(self, rate: int, format_name: str, complete: bool) -> None:
        target = writable_rate(rate, format_name)
        self._resampler = Resampler(rate, target) if target != rate else None
        self._file = _Growing(complete)
        self._sound = soundfile.SoundFile(
            self._file, "w", samplerate=target, channels=1, **_SOUNDFILE[format_name]
        )

    def feed(self, chunk: Audio) -> bytes:
        self._write(chunk if self._resampler is None else self._resampler.feed(chunk))
        return self._file.fresh()

    def finish(self) -> bytes:
        if self._resampler is not None:
            self._write(self._resampler.finish())
        self._sound.close()
        return self._file.rest()

    def _write(self, audio: Audio) -> None:
        if len(audio):
            self._sound.write(np.clip(audio, -1.0, 1.0))


# A constant bit rate lets players seek in an mp3 whose length tag was never filled in.
_SOUNDFILE: dict[str, dict[str, Any]] = {
    "mp3": {
        "format": "MP3",
        "subtype": "MPEG_LAYER_III",
        "bitrate_mode": "CONSTANT",
        "compression_level": 0.3,
    },
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "flac": {"format": "FLAC", "subtype": "PCM_16"},
}


class _Growing(io.BytesIO):
    """A file that can be read while it is written. What was read cannot be rewritten."""

    def __init__(self, complete: bool) -> None:
        super().__init__()
        self._complete = complete
        self._sent = 0

    def fresh(self) -> bytes:
        return b"" if self._complete else self.rest()

    def rest(self) -> bytes:
        content = self.getbuffer()
        piece = bytes(content[self._sent :])
        self._sent = len(content)
        content.release()
        return piece


def writable_rate(rate: int, format_name: str) -> int:
    """The rate in Hz that the format can carry: the next higher one, else its highest."""
    rates = _RATES.get(format_name)
    if rates is None or rate in rates:
        return rate
    return next((allowed for allowed in rates if allowed > rate), rates[-1])
