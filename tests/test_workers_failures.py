"""Which errors cost the process its device."""

from __future__ import annotations

import pytest

from workers.failures import is_sticky


class AcceleratorError(RuntimeError):
    """Named like torch's."""


@pytest.mark.parametrize(
    "error",
    [
        AcceleratorError("CUDA error: unknown error"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: unspecified launch failure"),
        RuntimeError("CUDA error: the launch timed out and was terminated"),
        Exception("CUDA failure 700: an illegal memory access was encountered ; GPU=0"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    ],
)
def test_these_are_sticky(error: Exception) -> None:
    assert is_sticky(error)
    wrapped = ValueError("decoding failed")
    wrapped.__cause__ = error
    assert is_sticky(wrapped)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        AcceleratorError("CUDA error: out of memory"),
        ValueError("illegal speaker"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        AssertionError(),
    ],
)
def test_these_are_not(error: Exception) -> None:
    assert not is_sticky(error)


def test_a_ring_of_causes_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert not is_sticky(first)
