"""Locust users of a farm: speech, streamed speech, and any JSON `/predict`."""

from __future__ import annotations

import itertools
import json
from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import gevent
from gevent.pool import Group
from locust import User
from locust.exception import StopTest

from loadtest import texts
from loadtest.arguments import OPEN, PREDICT, SPEECH, STREAM, check
from loadtest.calls import Answer, Caller, error_reason, now
from loadtest.samples import FAILED, OK, REFUSED, UNFINISHED, Sample

SPEECH_PATH = "/v1/audio/speech"
# Who cannot connect tries again after a moment: a caller in a tight loop would measure itself.
_AFTER_NO_ANSWER = 0.5
_PCM_BYTES = 2
BAD_ARGUMENTS = 2


@dataclass(frozen=True)
class Request:
    path: str
    name: str
    """How Locust's table calls it."""
    body: bytes
    text: str = ""
    text_length: int = 0


class FarmUser(User):  # type: ignore[misc]
    """Sends what --request says, in a closed or an open loop."""

    kind: ClassVar[str] = ""
    """What a subclass sends, whatever --request says."""
    _numbers: ClassVar[itertools.count[int]] = itertools.count()

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        options = environment.parsed_options
        try:
            check(options)
            self._texts = texts.load(Path(options.texts))
            self._caller = Caller(_checked(self.host), options.timeout)
        except (ArgumentTypeError, texts.TextsError) as error:
            environment.process_exit_code = BAD_ARGUMENTS
            raise StopTest(str(error)) from None
        self._options = options
        self._kind = self.kind or options.request
        # Two runs with one seed ask for the same texts in the same order, so they can be compared.
        self._random = Random(f"{options.seed} {next(self._numbers)}")  # noqa: S311
        self._open = options.loop == OPEN
        self._pause = 0.0
        self._flying = Group()
        self._next = now() + self._gap() * self._random.random() if self._open else 0.0

    def on_stop(self) -> None:
        """Let what is under way finish, for as long as --stop-timeout allows."""
        try:
            self._flying.join(timeout=self.environment.stop_timeout)
        finally:
            self._flying.kill()
            self._caller.close()

    def arrive(self) -> None:
        """A task: in a closed loop one request; in an open one whatever is due by now."""
        if not self._open:
            self._ask(self._request(), now())
            return
        # An arrival is a greenlet of its own, and its latency counts from when it was due: a farm
        # that answers late neither delays the next arrival nor hides that this one had to wait.
        while self._next <= now():
            self._flying.spawn(self._ask, self._request(), self._next)
            self._next += self._gap()

    tasks: ClassVar[list[Any]] = [arrive]

    def wait_time(self) -> float:
        """Seconds until the next task."""
        if self._open:
            return max(0.0, self._next - now())
        pause, self._pause = self._pause, 0.0
        return pause

    def _gap(self) -> float:
        rate = self._options.arrivals
        random = self._options.spacing == "random"
        return self._random.expovariate(rate) if random else 1 / rate

    def _request(self) -> Request:
        options = self._options
        if self._kind == PREDICT:
            return Request(
                options.predict_path, options.predict_path, options.predict_body.encode()
            )
        text = texts.pick(self._texts, options.text, self._random)
        streamed = self._kind == STREAM
        body = {
            "model": options.model,
            "voice": options.voice,
            "input": text.words,
            "response_format": "pcm" if streamed else options.audio_format,
            # Only a whole answer states its audio seconds, inference time and real-time factor.
            "stream": streamed,
        }
        name = f"{SPEECH_PATH}{' streamed' if streamed else ''}, {text.group} text"
        return Request(SPEECH_PATH, name, json.dumps(body).encode(), text.group, len(text.words))

    def _ask(self, request: Request, scheduled: float) -> None:
        try:
            answer = self._caller.post(request.path, request.body)
        except gevent.GreenletExit:
            self._report(request, scheduled, Answer(scheduled, ended=now()), UNFINISHED, "")
            raise
        outcome, error = self._judge(answer)
        if not answer.status:
            self._pause = _AFTER_NO_ANSWER
        elif outcome == REFUSED:
            self._pause = answer.number("retry-after") or _AFTER_NO_ANSWER
        self._report(request, scheduled, answer, outcome, error)

    def _judge(self, answer: Answer) -> tuple[str, str]:
        """The outcome, and what is wrong with it."""
        if answer.error:
            return FAILED, answer.error
        if answer.status == 429:
            return REFUSED, ""
        if not 200 <= answer.status < 300:
            return FAILED, error_reason(answer)
        if self._kind == PREDICT:
            return OK, ""
        content_type = answer.headers.get("content-type", "")
        if not content_type.startswith(("audio/", "application/octet-stream")):
            return FAILED, f"the answer is {content_type or 'of no type'}, not audio"
        return (OK, "") if answer.body else (FAILED, "the answer holds no audio")

    def _report(
        self, request: Request, scheduled: float, answer: Answer, outcome: str, error: str
    ) -> None:
        first = answer.first_byte
        sample = Sample(
            scheduled=scheduled,
            started=answer.started,
            latency_ms=1000 * (answer.ended - scheduled),
            first_byte_ms=None if first is None else 1000 * (first - scheduled),
            status=answer.status,
            outcome=outcome,
            error=error,
            queue_ms=answer.number("x-queue-time-ms"),
            inference_ms=answer.number("x-inference-time-ms"),
            audio_seconds=self._audio_seconds(answer),
            real_time_factor=answer.number("x-real-time-factor"),
            worker=answer.headers.get("x-worker-id", ""),
            kind=self._kind,
            text=request.text,
            text_length=request.text_length,
            answer_bytes=len(answer.body),
            request_id=answer.headers.get("x-request-id", ""),
        )
        self.environment.gpufarm_observe(sample, request.name)

    def _audio_seconds(self, answer: Answer) -> float | None:
        rate = answer.number("x-sample-rate")
        if self._kind == STREAM and answer.status == 200 and rate:
            return len(answer.body) / _PCM_BYTES / rate
        return answer.number("x-audio-seconds")


def _checked(host: str | None) -> str:
    if not (host or "").startswith(("http://", "https://")):
        raise ArgumentTypeError(f"--host is {host!r}; the farm's address is needed: http://…")
    return str(host)


class SpeechUser(FarmUser):
    """Speech, answered whole."""

    kind = SPEECH


class StreamingSpeechUser(FarmUser):
    """Speech as pcm while it is made: its first byte is the time to first audio."""

    kind = STREAM


class PredictUser(FarmUser):
    """--predict-body to --predict-path."""

    kind = PREDICT
