"""Load a worker's model, whatever its shape, and call it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from typing import Any, TypeVar

from workers.errors import LoadError
from workers.model.async_calls import DeviceLoop
from workers.model.audio import samples
from workers.model.contract import Audio, SpeechRequest
from workers.model.litserve import LitModel, is_litapi
from workers.model.loading import construct, load_class, run_step
from workers.model.responses import as_json, complete, stream
from workers.model.signatures import check_calls
from workers.model.spec import Spec

T = TypeVar("T")


class LoadedModel:
    """A loaded and warm model. Call all of its methods on the device thread."""

    def __init__(self, model: Any, spec: Spec, device: str, loop: DeviceLoop) -> None:
        self.spec = spec
        self.device = device
        self.speaks = hasattr(model, "speak")
        self.predicts = hasattr(model, "predict")
        self.is_litapi = isinstance(model, LitModel)
        self.predict_paths = ["/predict"]
        if isinstance(model, LitModel) and model.path != "/predict":
            self.predict_paths.append(model.path)
        self.sample_rate = 0
        self.voices: list[str] = []
        self.startup_seconds: dict[str, float] = {}
        self.report: dict[str, Any] = {}
        """The model's last health report."""
        self.longest_request: dict[str, Any] | list[Any] | None = None
        """What sizing sends to measure the footprint, if the model defines it."""
        self._model = model
        self._loop = loop

    def predict(self, payload: Any, events: bool) -> Any:
        """Return a Response, or an iterator: the content type, then chunks of bytes."""
        value = self._loop.resolve(self._model.predict(payload))
        if isinstance(value, Iterator):
            return stream(value, events)
        return complete(value)

    def speak(self, request: SpeechRequest) -> Iterator[Audio]:
        """Yield the speech in finite float32 chunks, as it is generated."""
        chunks = self._loop.resolve(self._model.speak(request))
        try:
            for chunk in chunks:
                request.work.check()
                audio = samples(chunk)
                if len(audio):
                    yield audio
        finally:
            close = getattr(chunks, "close", None)
            if close is not None:
                close()

    def speak_all(self, request: SpeechRequest) -> list[Audio]:
        """Return the same chunks as a list."""
        return list(self.speak(request))

    def refresh_report(self) -> None:
        """Call the model's health(); the report stays empty where there is none."""
        health = getattr(self._model, "health", None)
        if health is None:
            return
        value = self._loop.resolve(health())
        if not isinstance(value, dict):
            raise TypeError(f"health() must return a dict, got {type(value).__name__}")
        as_json(value)
        self.report = value

    def read_longest_request(self) -> None:
        """Call longest_request() once, at the start, so that no request waits for it."""
        ask = getattr(self._model, "longest_request", None)
        longest = self._loop.resolve(ask()) if ask is not None else None
        if longest is not None and not isinstance(longest, dict | list):
            kind = type(longest).__name__
            raise TypeError(f"longest_request() must return a dict or a list of dicts, got {kind}")
        as_json(longest)
        self.longest_request = longest


def load(spec: Spec, device: str, executor: Executor) -> LoadedModel:
    """Import the class here; construct, set up and warm up on the device thread.

    Raises LoadError: one line with what failed, why, and where.
    """
    cls = load_class(spec)
    return executor.submit(_prepare, cls, spec, device).result()


def _prepare(cls: type[Any], spec: Spec, device: str) -> LoadedModel:
    _check_class(cls, spec)
    began = time.perf_counter()
    model = construct(cls, spec)
    loop = DeviceLoop()
    if is_litapi(cls):
        model = LitModel(model, loop)
    check_calls(model, spec.target)
    loaded = LoadedModel(model, spec, device, loop)
    _step(spec, f'setup("{device}")', lambda: loop.resolve(model.setup(device)))
    load_ended = time.perf_counter()
    if loaded.speaks:
        _read_speech(model, loaded)
    elif spec.voice_aliases:
        raise LoadError(
            f"model.voice_aliases is set, but {spec.target} has no speak(request); remove it"
        )
    warm_up = getattr(model, "warm_up", None)
    if warm_up is not None:
        _step(spec, "warm_up()", lambda: loop.resolve(warm_up()))
    _step(spec, "health()", loaded.refresh_report)
    _step(spec, "longest_request()", loaded.read_longest_request)
    loaded.startup_seconds = {
        "load": load_ended - began,
        "warm_up": time.perf_counter() - load_ended,
    }
    return loaded


def _step(spec: Spec, what: str, step: Callable[[], T]) -> T:
    return run_step(f"{spec.target}: {what}", step)


def _check_class(cls: type[Any], spec: Spec) -> None:
    if not hasattr(cls, "setup"):
        raise LoadError(f"{spec.target} has no setup(device); define it")
    if not hasattr(cls, "predict") and not hasattr(cls, "speak"):
        raise LoadError(
            f"{spec.target} has neither predict(request) nor speak(request); define one of them"
        )


def _read_speech(model: Any, loaded: LoadedModel) -> None:
    target = loaded.spec.target
    rate = getattr(model, "sample_rate", None)
    if not isinstance(rate, int) or not 1000 <= rate <= 384_000:
        raise LoadError(
            f"{target}.sample_rate must be an integer from 1000 to 384000 Hz, got {rate!r}"
        )
    voices = getattr(model, "voices", None)
    if (
        not isinstance(voices, list | tuple)
        or not voices
        or not all(isinstance(voice, str) for voice in voices)
    ):
        raise LoadError(f"{target}.voices must be a list with at least one name, got {voices!r}")
    for alias, voice in loaded.spec.voice_aliases.items():
        if voice not in voices:
            raise LoadError(
                f'model.voice_aliases: "{alias}" stands for an unknown voice of {target}: '
                f'"{voice}"; its voices: {", ".join(voices)}'
            )
    loaded.sample_rate = rate
    loaded.voices = list(voices)
