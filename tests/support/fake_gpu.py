"""A fake GPU: CUDA's calls on the host's memory, and engines that ONNX Runtime runs from raw addresses.

It replaces `cuda-python` below `engines.cuda` and TensorRT below `engines.runner`, so that tests on any machine cover
what sessions do with addresses, pitches, profiles and graphs. It is stricter than a
GPU: memory is filled with NaN, each copy must lie inside one allocation and each shape inside the selected profile, and
what is captured runs when it is launched, not before.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from cuda.bindings import runtime as real

from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.engines import cuda, runner
from glmtrt_helpers.engines.plan_info import PlanInfo, read_info

OK = (real.cudaError_t.cudaSuccess,)
BAD = (real.cudaError_t.cudaErrorInvalidValue,)
MEMORY = 2 * 10**9


class FakeCuda:
    """The part of `cuda.bindings.runtime` that the workbook calls; all else, such as enumerations, is the real one.

    blocks: allocations by address. launches: how often a captured graph ran.
    """

    def __init__(self) -> None:
        self.blocks: dict[int, np.ndarray] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.launches = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(real, name)

    def _inside(self, address: int, nbytes: int) -> bool:
        return any(start <= address and address + nbytes <= start + b.nbytes for start, b in self.blocks.items())

    def _do(self, work: Callable[[], None]) -> tuple[Any]:
        work() if self.recording is None else self.recording.append(work)
        return OK

    def cudaMalloc(self, nbytes: int) -> tuple[Any, ...]:
        if sum(block.nbytes for block in self.blocks.values()) + nbytes > MEMORY:
            return (real.cudaError_t.cudaErrorMemoryAllocation,)
        wider = np.full(nbytes + 256, 0xFF, np.uint8)  # NaN, in fp16 and in fp32
        start = -wider.ctypes.data % 256
        block = wider[start : start + nbytes]
        self.blocks[block.ctypes.data] = block
        return (*OK, block.ctypes.data)

    cudaMallocHost = cudaMalloc

    def cudaFree(self, address: int) -> tuple[Any]:
        return OK if self.blocks.pop(address, None) is not None else BAD

    cudaFreeHost = cudaFree

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return (*OK, MEMORY - sum(block.nbytes for block in self.blocks.values()), MEMORY)

    def cudaMemset(self, address: int, value: int, nbytes: int) -> tuple[Any]:
        if not self._inside(address, nbytes):
            return BAD
        ctypes.memset(address, value, nbytes)
        return OK

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: Any, stream: Any) -> tuple[Any]:
        return self.cudaMemcpy2DAsync(target, nbytes, source, nbytes, nbytes, 1, kind, stream)

    def cudaMemcpy2DAsync(
        self, target: int, target_pitch: int, source: int, pitch: int, width: int, height: int, kind: Any, stream: Any
    ) -> tuple[Any]:
        kinds = real.cudaMemcpyKind
        span, target_span = (step * (height - 1) + width for step in (pitch, target_pitch))
        if kind != kinds.cudaMemcpyHostToDevice and not self._inside(source, span):
            return BAD
        if kind != kinds.cudaMemcpyDeviceToHost and not self._inside(target, target_span):
            return BAD

        def work() -> None:
            for row in range(height):
                ctypes.memmove(target + row * target_pitch, source + row * pitch, width)

        return self._do(work)

    def cudaStreamCreate(self) -> tuple[Any, ...]:
        return (*OK, "stream")

    def _nothing(self, *_: Any) -> tuple[Any]:
        return OK

    cudaStreamSynchronize = cudaStreamDestroy = cudaEventRecord = cudaEventSynchronize = cudaEventDestroy = _nothing
    cudaGraphDestroy = cudaGraphExecDestroy = _nothing

    def cudaEventElapsedTime(self, first: Any, second: Any) -> tuple[Any, ...]:
        return (*OK, 2.0)

    def cudaEventCreate(self) -> tuple[Any, ...]:
        return (*OK, "event")

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[Any]:
        self.recording = []
        return OK

    def cudaStreamEndCapture(self, stream: Any) -> tuple[Any, ...]:
        recorded, self.recording = self.recording, None
        return (*OK, recorded)

    def cudaGraphInstantiate(self, graph: list[Callable[[], None]], flags: int) -> tuple[Any, ...]:
        return (*OK, graph)

    def cudaGraphLaunch(self, graph: list[Callable[[], None]], stream: Any) -> tuple[Any]:
        self.launches += 1
        for work in graph:
            work()
        return OK


class FakeContext:
    """An execution context over ONNX Runtime; like TensorRT, it checks shapes against the profile."""

    def __init__(self, gpu: FakeCuda, info: PlanInfo, graph: Path):
        self.gpu, self.info = gpu, info
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self.tensors = {tensor.name: tensor for tensor in info.tensors}
        self.inputs, self.outputs = (
            [tensor.name for tensor in info.tensors if tensor.mode == mode] for mode in ("input", "output")
        )
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: Any) -> bool:
        self.profile, self.shapes = profile, {}
        return profile < len(self.info.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.tensors[name].profiles[self.profile]
        self.shapes = {each: self.shapes[each] for each in self.inputs if each in self.shapes} | {name: shape}
        return len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0 and name in self.tensors, (name, address)
        self.addresses[name] = address
        return True

    def get_tensor_address(self, name: str) -> int:
        return self.addresses[name]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Of an output before anything ran, too: the shape that it has for zeros of the input shapes."""
        if name not in self.shapes:
            zeros = {each: np.zeros(self.shapes[each], self.tensors[each].dtype) for each in self.inputs}
            arrays = self.session.run(self.outputs, zeros)
            self.shapes |= {each: array.shape for each, array in zip(self.outputs, arrays, strict=True)}
        return self.shapes[name]

    def execute_async_v3(self, stream: Any) -> bool:
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        assert set(shapes) >= set(self.inputs) and set(addresses) == set(self.tensors), "everything is bound"

        def view(name: str, shape: tuple[int, ...]) -> np.ndarray:
            dtype = np.dtype(self.tensors[name].dtype)
            nbytes = int(np.prod(shape)) * dtype.itemsize
            assert self.gpu._inside(addresses[name], nbytes), f"{name} of {shape} is not inside one allocation"
            memory = (ctypes.c_byte * nbytes).from_address(addresses[name])
            return np.frombuffer(memory, dtype).reshape(shape)

        def work() -> None:
            feeds = {name: view(name, shapes[name]).copy() for name in self.inputs}
            for name, array in zip(self.outputs, self.session.run(self.outputs, feeds), strict=True):
                view(name, array.shape)[...] = array
                self.shapes[name] = array.shape

        self.gpu._do(work)
        return True


def install(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Replace the driver, the GPU and TensorRT's runtime until the test ends."""
    gpu = FakeCuda()
    monkeypatch.setattr(cuda, "cudart", gpu)
    monkeypatch.setattr(tensorrt_package, "gpus", lambda: [tensorrt_package.Gpu("a fake GPU", (8, 9), MEMORY)])

    def load_plan(plan: Path, package: tensorrt_package.Package, log: Any) -> tuple[Any, Any]:
        info = read_info(plan)
        graph = plan.with_name(info.onnx)
        return "runtime", SimpleNamespace(
            create_runtime_config=lambda: SimpleNamespace(),
            create_execution_context=lambda config: FakeContext(gpu, info, graph),
        )

    monkeypatch.setattr(runner, "load_plan", load_plan)
    return gpu
