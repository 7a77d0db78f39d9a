"""Check, before any call, that a model's methods accept the arguments that a worker passes."""

from __future__ import annotations

import inspect
from typing import Any

from workers.errors import LoadError

CALLS = {
    "setup": ("device",),
    "predict": ("request",),
    "speak": ("request",),
    "warm_up": (),
    "health": (),
    "longest_request": (),
}
"""Every method that a worker calls → its positional arguments."""


def check_calls(
    model: Any, target: str, calls: dict[str, tuple[str, ...]] = CALLS, keyword: str = ""
) -> None:
    """Raise LoadError for the first of ``calls`` that ``model`` has and that cannot be called so.

    ``keyword``: a parameter that is passed by name where a method has it.
    """
    for name, arguments in calls.items():
        method = getattr(model, name, None)
        if method is None:
            continue
        as_called = f"{name}({', '.join(arguments)})"
        if not callable(method):
            raise LoadError(
                f"{target}.{name} is not a method but {type(method).__name__}: define {as_called}"
            )
        try:
            signature = inspect.signature(method)
        except (TypeError, ValueError):  # a builtin without a signature
            continue
        parameters = _without_annotations(signature)
        try:
            named = {keyword: None} if keyword in signature.parameters else {}
            signature.bind(*arguments, **named)
        except TypeError as error:
            raise LoadError(
                f"{target}.{name}{parameters} cannot be called as {as_called}: {error}; change its "
                "parameters"
            ) from None


def _without_annotations(signature: inspect.Signature) -> inspect.Signature:
    nothing = inspect.Parameter.empty
    return signature.replace(
        parameters=[part.replace(annotation=nothing) for part in signature.parameters.values()],
        return_annotation=nothing,
    )
