"""A plan on the GPU: its engine, one execution context and one stream, which the TensorRT sessions build on."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.tensorrt_package import Package
from glmtrt_helpers.core.text import shorten
from glmtrt_helpers.engines import cuda
from glmtrt_helpers.engines.callbacks import make_log
from glmtrt_helpers.engines.plan_info import PlanInfo, Tensor
from glmtrt_helpers.engines.profiles import find_profile
from glmtrt_helpers.sessions.base import Limits


class Engine:
    """weights, activations: bytes taken on the GPU. tensors: inputs and outputs by name, as the JSON has them."""

    def __init__(self, plan: Path, info: PlanInfo, package: Package, *, eager: bool = False, stream: Any = None):
        """eager: wait until the kernels of a new shape are compiled, rather than start with generic ones (RTX).

        stream: that of another engine, to be enqueued after it; by default the engine makes its own.
        """
        self.info = info
        self.tensors = {tensor.name: tensor for tensor in info.tensors}
        self._log = make_log(package.module)
        self._own_stream = cuda.new_stream() if stream is None else None
        self.stream = self._own_stream if stream is None else stream
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}  # input shapes that the context has, in the current profile
        start = cuda.free_device_memory()
        self._runtime, self._engine = load_plan(plan, package, self._log)
        if "weight-streaming" in info.options:
            self._engine.weight_streaming_budget_v2 = self._engine.get_weight_streaming_automatic_budget()
        loaded = cuda.free_device_memory()
        self.context = self._make_context(package.module, eager)
        self.weights, self.activations = start - loaded, loaded - cuda.free_device_memory()

    def _make_context(self, trt: Any, eager: bool) -> Any:
        """One context for all profiles; its activations are as large as the largest one needs."""
        config = self._engine.create_runtime_config()
        if eager and hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        context = self._engine.create_execution_context(config)
        if context is None:
            reason = self._log.first_error()
            if "memory" in reason.lower():
                raise cuda.out_of_memory("hold the engine's activations")
            raise WorkbookError(f"TensorRT could not make an execution context ({reason}): build the engine again.")
        return context

    @property
    def profile(self) -> str:
        """Name of the current profile."""
        return self.info.profiles[self._profile].name

    def select(self, batch: int, sequence: int, past: int) -> None:
        """Switch to the first profile that covers a shape. Raises WorkbookError where none does."""
        index = find_profile(self.info.profiles, batch, sequence, past)
        if index != self._profile:
            self._check(self.context.set_optimization_profile_async(index, self.stream), "switch the profile")
            self._profile = index
            self._shapes.clear()

    def bind(self, name: str, address: int, shape: Sequence[int] | None = None) -> None:
        """Set the address of a tensor, and the shape of an input."""
        if shape is not None and self._shapes.get(name) != tuple(shape):
            self._check(self.context.set_input_shape(name, tuple(shape)), f"take {name} of shape {tuple(shape)}")
            self._shapes[name] = tuple(shape)
        self.context.set_tensor_address(name, address)

    def enqueue(self) -> None:
        self._check(self.context.execute_async_v3(self.stream), "run the engine")

    def itemsize(self, name: str) -> int:
        """Bytes of one number of a tensor."""
        return np.dtype(self.tensors[name].dtype).itemsize

    def _check(self, done: bool, what: str) -> None:
        if not done:
            reason = self._log.errors.pop() if self._log.errors else "it gave no reason"
            raise WorkbookError(f"TensorRT could not {what} ({shorten(reason, 300)}).")

    def close(self) -> None:
        self.context = self._engine = self._runtime = None
        if self._own_stream is not None:
            cuda.destroy_stream(self._own_stream)


def load_plan(plan: Path, package: Package, log: Any) -> tuple[Any, Any]:
    """The runtime and the engine of a plan. Raises WorkbookError for a plan that this GPU does not load."""
    runtime = package.module.Runtime(log)
    with plan.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        engine = runtime.deserialize_cuda_engine(mapped)
    if engine is None:
        reason = log.first_error()
        if "memory" in reason.lower():
            raise cuda.out_of_memory(f"load {plan.name}")
        raise WorkbookError(
            f"{plan} cannot be loaded on this GPU by {package.name} {package.version} ({reason}): build it again here, "
            "or see `glmtrt doctor` for which package supports this GPU."
        )
    return runtime, engine


def read_engine(plan: Path, package: Package) -> list[Tensor]:
    """The inputs and outputs of a plan, as TensorRT describes them; needs a GPU, `plan_info.read_info` does not."""
    trt = package.module
    _runtime, engine = load_plan(plan, package, make_log(trt))
    tensors = []
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        profiles = range(engine.num_optimization_profiles if is_input else 0)
        shapes = [[list(shape) for shape in engine.get_tensor_profile_shape(name, index)] for index in profiles]
        dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name
        mode = "input" if is_input else "output"
        tensors.append(Tensor(name, mode, dtype, list(engine.get_tensor_shape(name)), shapes))
    return tensors


def limits(info: PlanInfo) -> Limits:
    """The largest shapes that an engine's profiles allow a chat."""
    profiles = info.profiles
    return Limits(
        batch=max(profile.batch.max for profile in profiles),
        prompt=max(profile.sequence.max for profile in profiles if 0 in profile.past),
        total=max(profile.past.max + profile.sequence.max for profile in profiles),
    )
