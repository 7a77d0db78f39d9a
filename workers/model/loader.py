"""Load a worker's model, whatever its shape, with one-line errors, and call it."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, TypeVar

from workers.device_errors import is_out_of_memory
from workers.errors import LoadError
from workers.model.async_calls import DeviceLoop
from workers.model.contract import Audio, SpeechRequest
from workers.model.litserve import LitModel, is_litapi
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
        from workers.model.audio import samples  # noqa: PLC0415 - see _check_speech_extra

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
    if hasattr(cls, "speak"):
        _check_speech_extra(spec)
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


def _check_speech_extra(spec: Spec) -> None:
    """Import what encodes speech, which the base installation lacks. Raises LoadError."""
    try:
        importlib.import_module("workers.model.audio")
    except ModuleNotFoundError as error:
        raise LoadError(
            f"{spec.target} has speak(request), but the module {error.name} is not installed; "
            "install it with: pip install 'gpufarm[speech]'"
        ) from None


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


def load_class(spec: Spec) -> type[Any]:
    """Import the class that ``spec.target`` names. Raises LoadError."""
    _extend_path(spec.path)
    module_name, _, class_name = spec.target.partition(":")
    parts = [*module_name.split("."), class_name]
    if not all(part.isidentifier() for part in parts):
        raise LoadError(
            f'model.target is not a class name: "{spec.target}"; write "package.module:Class"'
        )
    try:
        module = run_step(f'model.target "{spec.target}"', lambda: _import(module_name, spec))
    except LoadError as error:
        if isinstance(cause := error.__cause__, _CODE_ERRORS):
            error.permanent = not is_out_of_memory(cause)
        raise
    found = getattr(module, class_name, None)
    if found is None and (conflict := _name_conflict(f"{module_name}.{class_name}", spec)):
        raise LoadError(f'model.target "{spec.target}": {conflict}')
    if found is None:
        raise LoadError(
            f'model.target "{spec.target}": the module {module_name} ({_origin(module)}) '
            f"has no {class_name}; {_suggestion(module, class_name)}"
        )
    if not inspect.isclass(found):
        raise LoadError(
            f'model.target "{spec.target}" is not a class but {type(found).__name__}; name a class'
        )
    return found


def construct(cls: type[Any], spec: Spec) -> Any:
    """Return ``cls(**args)``. Raises LoadError with the arguments that the class takes."""
    try:
        signature = inspect.signature(cls)
    except (TypeError, ValueError):
        signature = None
    if signature is not None:
        try:
            signature.bind(**spec.args)
        except TypeError as error:
            raise LoadError(
                f"model.args {sorted(spec.args)} do not fit {spec.target}: {error}; "
                f"it takes {signature}"
            ) from None
    return run_step(f"{spec.target}(…)", lambda: cls(**spec.args))


_CODE_ERRORS = (ImportError, SyntaxError, NameError, AttributeError, TypeError)
"""What an import raises when the module itself is wrong or lacks a dependency."""


def run_step(what: str, step: Callable[[], T]) -> T:
    """Run a step of the start. Whatever it raises becomes a one-line LoadError with its location.

    The LoadError is not permanent: what the model's own code met may be gone at the next start.
    """
    try:
        return step()
    except LoadError:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        message = " ".join(str(error).split()) or "no message"
        raise LoadError(
            f"{what} failed: {type(error).__name__}: {message[:600]}{_location(error)}",
            permanent=False,
        ) from error


def _extend_path(folders: tuple[Path, ...]) -> None:
    for folder in reversed(folders):
        if not folder.is_dir():
            raise LoadError(f"path is not a folder: {folder}; correct it, or create the folder")
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


def _import(name: str, spec: Spec) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if conflict := _name_conflict(missing, spec):
            raise LoadError(f'model.target "{spec.target}": {conflict}') from None
        if name != missing and not name.startswith(f"{missing}."):
            raise LoadError(
                f'model.target "{spec.target}": {name} needs the module {missing}, which is not '
                f"installed{_location(error)}; {_installation(name)}"
            ) from None
        searched = ", ".join(str(folder) for folder in spec.path) or "no folders of its own"
        raise LoadError(
            f'model.target "{spec.target}": no module named {missing}; searched {searched} '
            f"and the installed packages; correct the name, or add its folder to workers.path"
        ) from None


def _installation(name: str) -> str:
    """Return the remedy when the module ``name`` imports something that is not installed."""
    if name.startswith("workers.models."):
        return "install what it needs with: pip install 'gpufarm[speech,torch,onnx]'"
    return f"install it into {sys.prefix}"


_OWN_PACKAGES = ("workers", "launcher", "balancer", "loadtest")
"""gpufarm's own packages, which every installation has."""


def _name_conflict(name: str, spec: Spec) -> str:
    """Explain that gpufarm's own package hides the user's module ``name``; empty where it does
    not."""
    top = name.partition(".")[0]
    if top not in _OWN_PACKAGES:
        return ""
    theirs = [folder / leaf for folder in spec.path for leaf in (top, f"{top}.py")]
    found = next((path for path in theirs if path.exists() and not _is_imported(path, top)), None)
    if found is None:
        return ""
    return (
        f'{found} has the name of gpufarm\'s own package "{top}", which is imported instead and '
        f"has no {name.removeprefix(f'{top}.')}; rename it, and the target with it"
    )


def _is_imported(path: Path, top: str) -> bool:
    """Whether ``import top`` imports ``path``."""
    found = importlib.util.find_spec(top)
    if found is None:
        return False
    places = [*(found.submodule_search_locations or ()), found.origin or ""]
    return path.resolve() in [Path(place).resolve() for place in places]


def _origin(module: Any) -> str:
    return getattr(module, "__file__", None) or "built in"


def _suggestion(module: Any, name: str) -> str:
    classes = [
        key
        for key, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__
    ]
    near = difflib.get_close_matches(name, classes, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"its classes: {', '.join(sorted(classes)) or 'none'}"


def _location(error: BaseException) -> str:
    """Return `` (file.py:12)``: the innermost line of the user's own code, if known."""
    if isinstance(error, SyntaxError):  # its message has the location
        return ""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(("<", str(Path(__file__).parent)))
    ]
    outside = [frame for frame in frames if "site-packages" not in frame.filename]
    innermost = (outside or frames)[-1:]
    return f" ({innermost[0].filename}:{innermost[0].lineno})" if innermost else ""
