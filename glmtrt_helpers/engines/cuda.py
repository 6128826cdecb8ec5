"""The CUDA calls of the TensorRT sessions: memory, copies, streams, events, graphs. Every status is checked."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from cuda.bindings import runtime as cudart

from glmtrt_helpers.core.errors import WorkbookError

TO_DEVICE = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
TO_HOST = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
WITHIN = cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
ALIGNMENT = 256


def check(result: tuple[Any, ...], what: str) -> Any:
    """The values that follow the status in the result of a call of CUDA's runtime, its driver or NVRTC.

    Raises WorkbookError for any other status than success.
    """
    status, *values = result
    if int(status) != 0:
        reason = ""
        if isinstance(status, cudart.cudaError_t):  # elsewhere the same numbers mean other things
            if status == cudart.cudaError_t.cudaErrorMemoryAllocation:
                cudart.cudaGetLastError()  # or the next call would report this one again
                raise out_of_memory(what)
            reason = f": {cudart.cudaGetErrorString(status)[1].decode()}"
        raise WorkbookError(f"CUDA could not {what}{reason} ({status.name}); see `glmtrt doctor`.")
    return values[0] if len(values) == 1 else tuple(values)


def out_of_memory(what: str) -> WorkbookError:
    """The error of a GPU that has too little memory to `what`, with how much of it is free."""
    status, free, total = cudart.cudaMemGetInfo()
    room = "" if status != cudart.cudaError_t.cudaSuccess else f" ({free / 1e9:.2f} of {total / 1e9:.2f} GB are free)"
    return WorkbookError(
        f"the GPU has not enough memory to {what}{room}: close other programs on it, or take fewer rows or tokens, "
        "which of an engine are the --batch, --prompt and --past that it is built for."
    )


def free_device_memory() -> int:
    """Bytes free on the current GPU."""
    return int(check(cudart.cudaMemGetInfo(), "ask for free memory")[0])


def aligned(nbytes: int) -> int:
    """nbytes rounded up to a multiple of ALIGNMENT, at least one: a tensor that starts after them is aligned, too."""
    return max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT


def aligned_tokens(tokens: int, nbytes: int) -> int:
    """tokens of nbytes each, rounded up until what follows them is aligned."""
    multiple = ALIGNMENT // math.gcd(ALIGNMENT, nbytes)
    return -(-tokens // multiple) * multiple


class DeviceMemory:
    """One allocation on the device. It is never empty, since TensorRT requires an address even for empty tensors."""

    def __init__(self, nbytes: int, what: str):
        self.nbytes = aligned(nbytes)
        self.address = int(check(cudart.cudaMalloc(self.nbytes), f"hold {what}, {nbytes / 1e6:.1f} MB"))

    def divide(self, sizes: Mapping[str, int]) -> dict[str, Buffer]:
        """Buffers of these sizes in bytes, one after the other."""
        buffers, address = {}, self.address
        for name, nbytes in sizes.items():
            buffers[name] = Buffer(address, nbytes)
            address += aligned(nbytes)
        assert address <= self.address + self.nbytes
        return buffers

    def clear(self) -> None:
        """Fill it with zeros."""
        check(cudart.cudaMemset(self.address, 0, self.nbytes), "clear memory")

    def free(self) -> None:
        if self.address:
            check(cudart.cudaFree(self.address), "free memory")
            self.address = 0


@dataclass(frozen=True)
class Buffer:
    """A part of an allocation on the device: its address, and its size in bytes."""

    address: int
    nbytes: int

    def fill(self, array: np.ndarray, stream: Any) -> None:
        """Copy a contiguous host array to the start of the buffer; returns once the array may be changed."""
        if array.nbytes > self.nbytes:
            raise WorkbookError(f"{array.nbytes:,} bytes do not fit a buffer of {self.nbytes:,}.")
        if array.nbytes:  # pageable memory is staged before the call returns
            check(
                cudart.cudaMemcpyAsync(self.address, array.ctypes.data, array.nbytes, TO_DEVICE, stream),
                "copy an input to the GPU",
            )


def read_rows(target: np.ndarray, address: int, pitch: int, stream: Any) -> None:
    """Copy rows that are `pitch` bytes apart on the device into a contiguous host array (rows, ...), and wait."""
    if not target.nbytes:
        return
    width = target.nbytes // len(target)
    check(
        cudart.cudaMemcpy2DAsync(target.ctypes.data, width, address, pitch, width, len(target), TO_HOST, stream),
        "copy an output from the GPU",
    )
    synchronize(stream)


def new_stream() -> Any:
    return check(cudart.cudaStreamCreate(), "create a stream")


def synchronize(stream: Any) -> None:
    check(cudart.cudaStreamSynchronize(stream), "finish the work on the GPU")


def destroy_stream(stream: Any) -> None:
    check(cudart.cudaStreamDestroy(stream), "destroy a stream")


def copy_rows(target: int, target_pitch: int, source: int, pitch: int, width: int, height: int, stream: Any) -> None:
    """Copy `height` rows of `width` bytes on the device; pitch, target_pitch: bytes from one row to the next."""
    check(
        cudart.cudaMemcpy2DAsync(target, target_pitch, source, pitch, width, height, WITHIN, stream),
        "copy rows into the cache",
    )


class Pinned:
    """An array in page-locked host memory, which the GPU writes to while the program goes on."""

    def __init__(self, shape: tuple[int, ...], dtype: str):
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.address = int(check(cudart.cudaMallocHost(nbytes), f"pin {nbytes} bytes of memory"))
        memory = memoryview((ctypes.c_byte * nbytes).from_address(self.address))
        self.array = np.frombuffer(memory, np.dtype(dtype)).reshape(shape)

    def receive(self, row: int, source: Buffer, stream: Any) -> None:
        """Start to copy into one row; the copy is done when an event that is recorded after it has occurred."""
        width = self.array[row].nbytes
        check(
            cudart.cudaMemcpyAsync(self.address + row * width, source.address, width, TO_HOST, stream),
            "copy a token from the GPU",
        )

    def free(self) -> None:
        check(cudart.cudaFreeHost(self.address), "free pinned memory")


def new_event() -> Any:
    """An event, which `mark` puts into a stream; it keeps the time."""
    return check(cudart.cudaEventCreate(), "create an event")


def mark(event: Any, stream: Any) -> None:
    check(cudart.cudaEventRecord(event, stream), "mark a point in the stream")


def wait(event: Any) -> None:
    check(cudart.cudaEventSynchronize(event), "finish the work on the GPU")


def elapsed_ms(first: Any, second: Any) -> float:
    return float(check(cudart.cudaEventElapsedTime(first, second), "ask for the time between two points"))


def destroy_event(event: Any) -> None:
    check(cudart.cudaEventDestroy(event), "destroy an event")


def capture(work: Callable[[], None], stream: Any) -> Any:
    """A graph of all that `work` enqueues on the stream, for `launch`; nothing runs now."""
    mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    check(cudart.cudaStreamBeginCapture(stream, mode), "begin to capture a graph")
    try:
        work()
    finally:
        graph = check(cudart.cudaStreamEndCapture(stream), "capture a graph")
    try:
        return check(cudart.cudaGraphInstantiate(graph, 0), "make a graph")
    finally:
        check(cudart.cudaGraphDestroy(graph), "destroy a graph")


def launch(graph: Any, stream: Any) -> None:
    check(cudart.cudaGraphLaunch(graph, stream), "run a graph")


def destroy_graph(graph: Any) -> None:
    check(cudart.cudaGraphExecDestroy(graph), "destroy a graph")
