"""Sizes as people write them ("7GiB", "24G", "512MB") and as bytes."""

from __future__ import annotations

import re

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

_UNITS = {
    "": 1,
    "b": 1,
    "k": KIB,
    "m": MIB,
    "g": GIB,
    "t": TIB,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": TIB,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_size(value: object) -> int:
    """Parse a number of bytes, or a string such as ``"7GiB"``, ``"1.5 GiB"``, ``"512MB"``.

    ``GiB`` and the bare letter ``G`` are 1024³ bytes, ``GB`` is 10⁹; no unit means bytes.
    Raises ValueError for anything else, negative numbers and booleans included.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, float) and value >= 0 and value.is_integer():
        return int(value)
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        if match and match[2].lower() in _UNITS:
            return round(float(match[1]) * _UNITS[match[2].lower()])
    raise ValueError('must be a size such as "7GiB", "512MiB" or a number of bytes')


def parse_size_with_unit(text: str) -> int:
    """Parse a size as ``parse_size`` does, but refuse a bare number: "24" may mean GiB.

    Raises ValueError; also for a size of 0.
    """
    if re.fullmatch(r"\s*\d+(?:\.\d+)?\s*", text):
        raise ValueError(f"has no unit; write {text.strip()}GiB or {text.strip()}MiB")
    size = parse_size(text)
    if size == 0:
        raise ValueError("must be larger than 0 bytes")
    return size


def format_size(size: int) -> str:
    """Format a size: two decimals at most, ``"22.8 GiB"``; exact ones stay ``"7 GiB"``."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:.2f}".rstrip("0").rstrip(".") + f" {name}"
    return f"{size} B"
