"""Classification of errors: device lost, or out of memory."""

from __future__ import annotations

import errno
import multiprocessing
import resource

import numpy as np
import pytest

from workers.device_errors import is_out_of_memory, is_sticky

torch = pytest.importorskip("torch")

FAIL = "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Conv node. "
ARENA = (
    "Name:'' Status Message: /onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:360 void* "
    "onnxruntime::BFCArena::AllocateRawInternal(size_t, bool, onnxruntime::Stream*) "
)


def accelerator(message: str, code: int | None = None) -> Exception:
    """torch's own class, with the field that torch sets when the device raises it."""
    error: Exception = torch.AcceleratorError(message)
    if code is not None:
        error.error_code = code  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    "error",
    [
        accelerator("CUDA error: whatever it says", 700),
        *(accelerator("CUDA error", code) for code in (214, 702, 710, 714, 715, 716, 718, 719)),
        *(accelerator("CUDA error", code) for code in range(805, 811)),
        accelerator("CUDA error: an illegal memory access was encountered"),
        accelerator(
            "CUDA error: what a later version says\nSearch for `cudaErrorLaunchFailure' in the docs"
        ),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: unspecified launch failure"),
        RuntimeError("CUDA error: the launch timed out and was terminated"),
        Exception("CUDA failure 700: an illegal memory access was encountered ; GPU=0"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("cuLaunchKernel: CUDA_ERROR_ILLEGAL_ADDRESS"),
        RuntimeError("Triton Error [CUDA]: misaligned address"),
    ],
    ids=str,
)
def test_lost_context_is_sticky(error: Exception) -> None:
    assert is_sticky(error)
    assert not is_out_of_memory(error)
    wrapped = ValueError("decoding failed")
    wrapped.__cause__ = error
    assert is_sticky(wrapped)


@pytest.mark.parametrize(
    "error",
    [
        accelerator("CUDA error: invalid argument", 1),
        accelerator("CUDA error: an illegal memory access was encountered", 1),
        accelerator("CUDA error: invalid configuration argument", 9),
        accelerator("CUDA error: out of memory", 2),
        accelerator("CUDA error: invalid device function"),
        ValueError("illegal speaker"),
        ValueError("cannot speak: device-side assert triggered"),
        ValueError("unknown error"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        AssertionError(),
    ],
    ids=str,
)
def test_rejected_call_is_not_sticky(error: Exception) -> None:
    assert not is_sticky(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("whatever it says"),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        accelerator("CUDA error: whatever it says", 2),
        accelerator("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
        RuntimeError(FAIL + ARENA + "Failed to allocate memory for requested buffer of size 9"),
        RuntimeError(
            FAIL + ARENA + "Available memory of 5 is smaller than requested bytes of 9437184"
        ),
        RuntimeError("CUDA failure 2: out of memory ; GPU=0 ; hostname=h ; expr=cudaMalloc"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libx.so: failed to map segment from shared object"),
    ],
    ids=lambda error: f"{type(error).__name__}: {error}"[:60],
)
def test_out_of_memory_is_recognised_and_not_sticky(error: BaseException) -> None:
    assert is_out_of_memory(error)
    assert not is_sticky(error)
    wrapped = ValueError("loading failed")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("this text is about running out of memory"),
        RuntimeError("CUDA error: invalid argument"),
        RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"),
        OSError(errno.ENOENT, "No such file"),
    ],
)
def test_other_errors_are_not_out_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_torch_out_of_memory_on_a_cpu() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize("arena", [True, False])
def test_onnxruntime_out_of_memory(arena: bool) -> None:
    """What it really raises, in a process of its own with a bounded address space."""
    pytest.importorskip("onnxruntime")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        message, exhausted = pool.apply_async(_allocates_too_much, (arena,)).get(90)
    assert exhausted, message


def _allocates_too_much(arena: bool) -> tuple[str, bool]:
    import onnx
    import onnxruntime

    helper, kinds = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [helper.make_node("Expand", ["x", "shape"], ["y"])],
        "expand",
        [
            helper.make_tensor_value_info("x", kinds.FLOAT, [1]),
            helper.make_tensor_value_info("shape", kinds.INT64, [1]),
        ],
        [helper.make_tensor_value_info("y", kinds.FLOAT, ["n"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = arena
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    try:
        session.run(None, {"x": np.zeros(1, np.float32), "shape": np.array([2**36])})
    except Exception as error:
        return str(error), is_out_of_memory(error)
    return "it had the memory", False


def test_cyclic_causes_terminate() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert not is_sticky(first)
    assert not is_out_of_memory(first)
