"""A plan on the GPU: its engine, one execution context, one stream. What the sessions of 06 and of `fast` share."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.tensorrt_package import Package
from glmtrt_helpers.engines import cuda
from glmtrt_helpers.engines.callbacks import make_log
from glmtrt_helpers.engines.plan_info import PlanInfo, Tensor, dtype_name
from glmtrt_helpers.engines.profiles import find_profile
from glmtrt_helpers.sessions.base import Limits


def read_engine(plan: Path, package: Package) -> list[Tensor]:
    """Deserialise a plan and read its IO tensors with every profile; needs a driver, `plan_info.read_info` does not."""
    trt = package.module
    log = make_log(trt)
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise WorkbookError(f"{plan} is not loaded by {package.name} {package.version} ({log.first_error()}).")
    tensors = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        count = engine.num_optimization_profiles if is_input else 0
        shapes = [[list(s) for s in engine.get_tensor_profile_shape(name, p)] for p in range(count)]
        mode, dtype = "input" if is_input else "output", dtype_name(engine.get_tensor_dtype(name))
        tensors.append(Tensor(name, mode, dtype, list(engine.get_tensor_shape(name)), shapes))
    return tensors


def limits(info: PlanInfo) -> Limits:
    """The largest shapes that a chat may ask an engine for."""
    boxes = info.profiles
    return Limits(
        max(box.batch.max for box in boxes),
        max(box.sequence.max for box in boxes if 0 in box.past),
        max(box.past.max + box.sequence.max for box in boxes),
    )


class Engine:
    """weights, activations: bytes taken on the GPU. tensors: of the JSON, by name."""

    def __init__(
        self, plan: Path, info: PlanInfo, package: tensorrt_package.Package, *, eager: bool = False, stream: Any = None
    ):
        """eager: wait for the kernels of each new shape, rather than begin with general ones (RTX).

        stream: another engine's, to run behind it; one of its own by default.
        """
        self.info = info
        self.tensors = {tensor.name: tensor for tensor in info.tensors}
        self._log = make_log(package.module)
        self._own_stream = cuda.new_stream() if stream is None else None
        self.stream = self._own_stream if stream is None else stream
        self._shapes: dict[str, tuple[int, ...]] = {}  # as they are set, in the profile that is
        start = cuda.free_device_memory()
        self._runtime, self._engine = self._load(package, plan)
        loaded = cuda.free_device_memory()
        self.context = self._make_context(package.module, eager)
        self.weights, self.activations = start - loaded, loaded - cuda.free_device_memory()
        self._profile = 0

    def _load(self, package: tensorrt_package.Package, plan: Path) -> tuple[Any, Any]:
        trt = package.module
        runtime = trt.Runtime(self._log)
        with plan.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            engine = runtime.deserialize_cuda_engine(mapped)
        if engine is None:
            said = self._log.first_error()
            if "memory" in said.lower():
                raise cuda.out_of_memory(f"load {plan.name}")
            raise WorkbookError(
                f"{plan} is not loaded on this GPU by {package.name} {package.version} ({said}): build it again here, "
                "or see `glmtrt doctor` for which package supports this GPU."
            )
        if "weight-streaming" in self.info.options:
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        return runtime, engine

    def _make_context(self, trt: Any, eager: bool) -> Any:
        """One context for all profiles; its activations are as large as the largest one needs."""
        config = self._engine.create_runtime_config()
        if eager and hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        context = self._engine.create_execution_context(config)
        if context is None:
            said = self._log.first_error()
            if "memory" in said.lower():
                raise cuda.out_of_memory("hold the engine's activations")
            raise WorkbookError(f"TensorRT could not make an execution context ({said}): build the engine again.")
        return context

    @property
    def profile(self) -> str:
        """Name of the profile that the last call ran in."""
        return self.info.profiles[self._profile].name

    def select(self, batch: int, sequence: int, past: int) -> None:
        """Switch to the first profile that covers a request. Raises WorkbookError where none does."""
        wanted = find_profile(self.info.profiles, batch, sequence, past)
        if wanted != self._profile:
            self.must(self.context.set_optimization_profile_async(wanted, self.stream), "switch the profile")
            self._profile = wanted
            self._shapes.clear()

    def bind(self, name: str, address: int, shape: Sequence[int] | None = None) -> None:
        """Where a tensor lies; shape: of an input."""
        if shape is not None and self._shapes.get(name) != tuple(shape):
            self.must(self.context.set_input_shape(name, tuple(shape)), f"take {name} of shape {tuple(shape)}")
            self._shapes[name] = tuple(shape)
        self.context.set_tensor_address(name, address)

    def enqueue(self) -> None:
        self.must(self.context.execute_async_v3(self.stream), "run the engine")

    def width(self, name: str) -> int:
        """Bytes of one number of a tensor."""
        return np.dtype(self.tensors[name].dtype).itemsize

    def must(self, done: bool, what: str) -> None:
        if not done:
            said = self._log.errors.pop() if self._log.errors else "it gave no reason"
            raise WorkbookError(f"TensorRT could not {what} ({' '.join(said.split())[:300]}).")

    def close(self) -> None:
        self.context = self._engine = self._runtime = None
        if self._own_stream is not None:
            cuda.destroy_stream(self._own_stream)
