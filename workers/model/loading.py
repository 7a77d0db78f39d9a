"""Import ``package.module:Class`` and construct it, with one-line errors."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from workers.device_errors import is_out_of_memory
from workers.errors import LoadError
from workers.model.spec import Spec

T = TypeVar("T")


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
                f"installed{_location(error)}; install it into {sys.prefix}"
            ) from None
        searched = ", ".join(str(folder) for folder in spec.path) or "no folders of its own"
        raise LoadError(
            f'model.target "{spec.target}": no module named {missing}; searched {searched} '
            f"and the installed packages; correct the name, or add its folder to workers.path"
        ) from None


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
