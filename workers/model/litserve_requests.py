"""Convert a payload for a LitAPI's ``decode_request``, by its annotation, like LitServe.

=============================  =========================================================
none, ``Any`` or ``Request``   parsed JSON, or Starlette's FormData of a form
``UploadFile``                 the file in the form's field ``request``
any other type but a scalar    parsed JSON, validated and converted by pydantic
=============================  =========================================================
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request

from workers.errors import LoadError
from workers.model.contract import InvalidRequest

FILE_FIELD = "request"
"""LitServe's endpoint has one parameter, and FastAPI names the form's field after it."""

_SCALARS = (str, bytes, int, float, bool, complex)


def converter(hook: Callable[..., Any], name: str) -> Callable[[Any], Any]:
    """Return a function that converts a payload for ``hook``; it raises InvalidRequest.

    Raises LoadError for an annotation that is not supported; ``name`` is the class's.
    """
    kind = _annotation(hook)
    if kind in (None, Any) or _is(kind, Request):
        return lambda payload: payload
    if _is(kind, UploadFile):
        return _file
    if _is(kind, _SCALARS):
        raise LoadError(
            f"{name}.decode_request: annotation of request is not supported: {kind.__name__}, "
            "which LitServe reads from the query string; remove it (parsed JSON), or use Request, "
            "UploadFile or a pydantic model"
        )
    # litserve has imported it by now; workers of other classes save the import.
    from pydantic import TypeAdapter  # noqa: PLC0415
    from pydantic.errors import PydanticUserError  # noqa: PLC0415

    try:
        adapter = TypeAdapter(kind)
    except PydanticUserError as error:
        raise LoadError(
            f"{name}.decode_request: annotation of request is not supported: {kind}: "
            f"{str(error).splitlines()[0]}; remove it (parsed JSON), or use Request, UploadFile or "
            "a pydantic model"
        ) from None
    return lambda payload: _checked(adapter, payload)


def _annotation(hook: Callable[..., Any]) -> Any:
    try:
        return typing.get_type_hints(hook).get("request")
    except Exception:  # a hint that cannot be resolved counts as none
        return None


def _is(kind: Any, base: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, base)


def _file(payload: Any) -> UploadFile:
    given = payload.get(FILE_FIELD) if isinstance(payload, Mapping) else None
    if not isinstance(given, UploadFile):
        raise InvalidRequest(
            f"The form has no file in its field {FILE_FIELD!r}; send one as multipart/form-data."
        )
    return given


def _checked(adapter: Any, payload: Any) -> Any:
    try:
        return adapter.validate_python(payload)
    except ValueError as error:
        raise InvalidRequest(" ".join(str(error).split())) from None
