"""Explain which part of a model's result JSON cannot carry, and what to return instead."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

_MAX_DEPTH = 900
"""Levels to search; json itself gives up near the interpreter's limit of 1,000."""

_REMEDIES = (
    (("set", "frozenset", "deque", "dict_keys", "dict_values"), "return a list"),
    (
        ("bytes", "bytearray", "memoryview"),
        "return the bytes alone, or base64.b64encode(…).decode()",
    ),
    (("datetime", "date", "time"), "return its isoformat()"),
    (("PosixPath", "Decimal", "UUID"), "return str() or float() of it"),
    (("complex",), "return its real and imag as two numbers"),
    (("generator", "map", "filter", "zip", "range"), "return a list, or yield from predict"),
)


def plain(value: Any) -> Any:
    """json.dumps' ``default``. Raises TypeError for what has no JSON form."""
    if hasattr(value, "tolist"):  # numpy arrays and scalars, torch tensors
        return value.tolist()
    if hasattr(value, "model_dump"):  # pydantic
        return value.model_dump(mode="json")
    raise TypeError(f"{_article(value)}, which JSON cannot carry: {_remedy(value)}")


def unsendable(value: Any, error: Exception) -> str:
    """Explain why json.dumps failed with ``error`` on ``value``: ``a set at ["tags"], which JSON
    cannot carry: return a list``."""
    if isinstance(error, RecursionError) or "Circular reference" in str(error):
        return "a value that is nested too deeply, or within itself: return a flat one"
    for found in _faults(value, "", 0):
        return found
    return f"what JSON cannot carry: {' '.join(str(error).split())[:200]}"


def _faults(value: Any, where: str, depth: int) -> Iterator[str]:
    """Yield every part that cannot be sent, in order; lazily, since the first one is enough."""
    if depth > _MAX_DEPTH or value is None or isinstance(value, str | bool | int):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            yield f"{value}{_at(where)}, which JSON cannot carry: return None or a finite number"
    elif isinstance(value, dict):
        for key, item in value.items():
            if not (key is None or isinstance(key, str | int | float)):
                yield f"a dict{_at(where)} with a {type(key).__name__} as a key: use strings"
            yield from _faults(item, f"{where}[{key!r:.60}]", depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _faults(item, f"{where}[{index}]", depth + 1)
    else:
        try:
            simpler = plain(value)
        except TypeError:
            yield f"{_article(value)}{_at(where)}, which JSON cannot carry: {_remedy(value)}"
        else:
            yield from _faults(simpler, where, depth + 1)


def _at(where: str) -> str:
    return f" at {where}" if where else ""


def _article(value: Any) -> str:
    kind = _kind(value)
    if kind == "bytes":
        return kind
    return f"an {kind}" if kind[0] in "aeiouAEIOU" else f"a {kind}"


def _kind(value: Any) -> str:
    cls = type(value)
    return "PIL image" if _is_picture(value) else cls.__name__


def _is_picture(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "PIL" and hasattr(value, "save")


def _remedy(value: Any) -> str:
    if _is_picture(value):
        return "save it as PNG to an io.BytesIO and return getvalue(), or that in base64"
    name = type(value).__name__
    for names, remedy in _REMEDIES:
        if name in names:
            return remedy
    return "return numbers, strings, lists and dicts"
