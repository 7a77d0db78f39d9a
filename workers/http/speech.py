"""``POST /v1/audio/speech``: text in, speech out, complete or streamed."""

from __future__ import annotations

import asyncio
import base64
from functools import partial
from typing import Any

from workers.errors import ApiError
from workers.http.context import RequestContext, parse_json
from workers.http.speech_request import SpeechOptions, parse_speech
from workers.http.state import WorkerState
from workers.model.audio import CONTENT_TYPES, Encoder, encode, encoder, writable_rate
from workers.model.contract import Audio
from workers.model.responses import EVENTS, as_json


class Speech:
    def __init__(self, worker: WorkerState) -> None:
        self._worker = worker

    async def __call__(self, context: RequestContext) -> None:
        worker = self._worker
        work = context.work()
        body = await context.read_body(worker.spec.body_limit)
        worker.queue.check()
        options = parse_speech(parse_json(body), worker.spec, worker.loaded.voices, work)
        worker.speech_rate.check(options.speech, context.limit)
        if options.progressive:
            await self._stream(context, options)
        else:
            await self._complete(context, options)
        if context.job is not None:
            worker.speech_rate.add(options.speech, context.job.busy_seconds)

    async def _complete(self, context: RequestContext, options: SpeechOptions) -> None:
        loaded = self._worker.loaded
        call = partial(loaded.speak_all, options.speech)
        job = self._worker.queue.submit(call, options.speech.work, context.key)
        with context.cancel_on_disconnect(job):
            chunks: list[Audio] = await anext(job)
            seconds = sum(map(len, chunks)) / loaded.sample_rate
            if not chunks:
                raise _no_audio()
            context.audio_seconds = seconds
            body = await self._write(
                options, encode, chunks, loaded.sample_rate, options.response_format
            )
        headers = {
            "x-sample-rate": self._rate(options),
            "x-audio-seconds": f"{seconds:.3f}",
            "x-real-time-factor": f"{job.service_seconds / seconds:.4f}",
        }
        await context.respond(200, body, CONTENT_TYPES[options.response_format], headers)

    async def _stream(self, context: RequestContext, options: SpeechOptions) -> None:
        loaded = self._worker.loaded
        call = partial(loaded.speak, options.speech)
        job = self._worker.queue.submit(call, options.speech.work, context.key)
        count = 0
        writer: Encoder | None = None
        with context.cancel_on_disconnect(job):
            async for chunk in job:
                if writer is None:
                    writer = encoder(loaded.sample_rate, options.response_format)
                    await self._begin(context, options)
                count += len(chunk)
                context.audio_seconds = count / loaded.sample_rate
                data = await self._write(options, writer.feed, chunk)
                await context.send_chunk(_frame(data, options))
            if writer is None:
                raise _no_audio()
            data = await self._write(options, writer.finish)
            await context.send_chunk(_frame(data, options))
            if options.events:
                await context.send_chunk(_done(options, count / loaded.sample_rate))
            await context.end_stream()

    async def _begin(self, context: RequestContext, options: SpeechOptions) -> None:
        content_type = CONTENT_TYPES[options.response_format]
        if options.events:
            content_type = EVENTS
            context.error_event = _error_event
        await context.start_stream(content_type, {"x-sample-rate": self._rate(options)})

    def _rate(self, options: SpeechOptions) -> str:
        """Sample rate of the response in Hz: not the model's where the format cannot carry that."""
        return str(writable_rate(self._worker.loaded.sample_rate, options.response_format))

    def _is_cheap(self, options: SpeechOptions) -> bool:
        """Whether the event loop may encode: only casts. Compression and resampling run on the
        encoder thread."""
        rate = self._worker.loaded.sample_rate
        name = options.response_format
        return name == "wav" or (name == "pcm" and writable_rate(rate, name) == rate)

    async def _write(self, options: SpeechOptions, write: Any, *arguments: Any) -> bytes:
        if self._is_cheap(options):
            return bytes(write(*arguments))
        loop = asyncio.get_running_loop()
        return bytes(await loop.run_in_executor(self._worker.encoder_thread, write, *arguments))


def _no_audio() -> ApiError:
    return ApiError(500, "The model produced no audio for this input.", code="no_audio")


def _frame(data: bytes, options: SpeechOptions) -> bytes:
    if not options.events or not data:
        return data
    return _event({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()})


def _done(options: SpeechOptions, seconds: float) -> bytes:
    """The last event. OpenAI's clients expect token counts; there are no tokens, so 0."""
    usage = {
        "input_tokens": 0,
        "output_tokens": 0,
        "total_tokens": 0,
        "characters": len(options.speech.input),
        "audio_seconds": round(seconds, 3),
    }
    return _event({"type": "speech.audio.done", "usage": usage})


def _error_event(body: dict[str, Any]) -> bytes:
    return _event({"type": "error", **body})


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + as_json(value) + b"\n\n"
