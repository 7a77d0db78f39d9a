"""Classify device errors: is the device lost to this process, is memory exhausted.

Recognises classes, error codes and status names, without importing torch, ONNX Runtime or CUDA:
the model may use any of them, and none has to be installed. Words of a message count only where
a library of NVIDIA's, torch or ONNX Runtime wrote them: the text of a request must not end a
worker's process.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

OUT_OF_MEMORY = 2
"""cudaErrorMemoryAllocation, and CUDA_ERROR_OUT_OF_MEMORY of the driver."""

_STICKY: dict[int, tuple[str, str]] = {
    # code: (name without the prefix cudaError, what cudaGetErrorString() says)
    214: ("ECCUncorrectable", "uncorrectable ECC error"),
    220: ("NvlinkUncorrectable", "uncorrectable NVLink error"),
    700: ("IllegalAddress", "illegal memory access"),
    702: ("LaunchTimeout", "launch timed out"),
    709: ("ContextIsDestroyed", "context is destroyed"),
    710: ("Assert", "device-side assert"),
    714: ("HardwareStackError", "hardware stack error"),
    715: ("IllegalInstruction", "illegal instruction"),
    716: ("MisalignedAddress", "misaligned address"),
    717: ("InvalidAddressSpace", "not supported on global/shared address space"),
    718: ("InvalidPc", "invalid program counter"),
    719: ("LaunchFailure", "unspecified launch failure"),
    805: ("MpsConnectionFailed", "MPS client failed to connect"),
    806: ("MpsRpcFailure", "remote procedural call between the MPS server"),
    807: ("MpsServerNotReady", "MPS server is not ready"),
    808: ("MpsMaxClientsReached", "resources required to create MPS client"),
    809: ("MpsMaxConnectionsReached", "resources required to device connections"),
    810: ("MpsClientTerminated", "MPS client has been terminated"),
    999: ("Unknown", "unknown error"),
}
"""After one of these the CUDA context answers every call with the same error until it is gone."""

_CODE = re.compile(r"CUDA (?:failure|error) (\d+)\b", re.IGNORECASE)
"""ONNX Runtime's `CUDA failure 700: …`."""
_RUNTIME_NAME = re.compile(r"cudaError(\w+)")
_DRIVER_NAME = re.compile(r"CUDA_ERROR_([A-Z_]+)")
_OF_CUDA = re.compile(r"CUDA|cuDNN|cuBLAS|TensorRT|NVML", re.IGNORECASE)
_LOST = re.compile(r"GPU is lost|fallen off the bus", re.IGNORECASE)
_NAMES = {name.lower(): code for code, (name, _) in _STICKY.items()} | {
    "memoryallocation": OUT_OF_MEMORY,
    "outofmemory": OUT_OF_MEMORY,  # the driver's names differ for these
    "launchfailed": 719,
    "hardwarestackerror": 714,
}
_TEXTS = {text.lower(): code for code, (_, text) in _STICKY.items()}

_NO_MEMORY = re.compile(
    # cuBLAS and its relatives; cuDNN before version 9, and since
    r"CU(?:BLAS|DNN|SOLVER|SPARSE)_STATUS_ALLOC_FAILED|CUFFT_ALLOC_FAILED"
    r"|CUDNN_STATUS_INTERNAL_ERROR_(?:HOST|DEVICE)_ALLOCATION_FAILED"
    # CUDA, as torch and others write it
    r"|CUDA error: out of memory|CUDA out of memory\."
    # ONNX Runtime: its arena, and its allocators without one
    r"|BFCArena::\S+.* Failed to allocate memory for requested buffer of size"
    r"|Available memory of \d+ is smaller than requested bytes of"
    r"|Status Message: std::bad_alloc|Status Message: bad allocation"
    # TensorRT; torch on the CPU; the loader of shared libraries
    r"|Error Code 2: OutOfMemory"
    r"|DefaultCPUAllocator: (?:can't allocate|not enough) memory"
    r"|cannot allocate memory in static TLS|failed to map segment from shared object",
    re.DOTALL,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether host or device memory is exhausted, in this error or one of its causes."""
    return any(_is_out_of_memory(cause) for cause in _causes(error))


def is_sticky(error: BaseException) -> bool:
    """Whether the device is lost to this process. Running out of memory does not lose it, nor
    does a call that CUDA rejects, as with an invalid argument."""
    return any(_lost(cause) for cause in _causes(error))


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    # torch.OutOfMemoryError, which is torch.cuda.OutOfMemoryError too; CuPy's has the same name
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    code = _code(error)
    return code == OUT_OF_MEMORY if code is not None else bool(_NO_MEMORY.search(str(error)))


def _lost(error: BaseException) -> bool:
    if _is_out_of_memory(error):
        return False
    # ONNX Runtime's name for a device that was reset or removed under it
    if type(error).__name__ == "DeviceReset" and type(error).__module__.startswith("onnxruntime"):
        return True
    code = _code(error)
    return code in _STICKY if code is not None else bool(_LOST.search(str(error)))


def _code(error: BaseException) -> int | None:
    """Return CUDA's error code, from the error's own field (torch's AcceleratorError has one), else
    from its message; None where neither has one."""
    code = getattr(error, "error_code", None)
    if isinstance(code, int) and type(error).__name__ == "AcceleratorError":
        return code
    text = str(error)
    if not _OF_CUDA.search(text):
        return None
    if found := _CODE.search(text):
        return int(found[1])
    for pattern in (_RUNTIME_NAME, _DRIVER_NAME):
        for name in pattern.findall(text):
            if (code := _NAMES.get(name.replace("_", "").lower())) is not None:
                return code
    lower = text.lower()
    return next((code for words, code in _TEXTS.items() if words in lower), None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and what it was raised from, or while handling."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__
