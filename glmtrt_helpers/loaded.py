"""A plan on the GPU: its engine, one execution context, one stream. What the sessions of 06 and of `fast` share."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glmtrt_helpers import cuda, packages, plans, profiles
from glmtrt_helpers.callbacks import make_log
from glmtrt_helpers.checkpoints import Checkpoint
from glmtrt_helpers.errors import WorkbookError
from glmtrt_helpers.plans import PlanInfo
from glmtrt_helpers.runtime import Limits


def check_plan(checkpoint: Checkpoint, plan: Path) -> tuple[Path, PlanInfo, packages.Package]:
    """The plan, its JSON and the package that runs it. The JSON is asked before any GPU is looked for."""
    info = plans.open_plan(checkpoint, plan)
    cards = packages.gpus()
    if not cards:
        raise WorkbookError(
            "there is no GPU here, or its driver does not answer, and an engine runs only on one: take the "
            "backend ort or torch, and see `glmtrt doctor`."
        )
    here = packages.capability_text(cards[0])
    if info.compute_capabilities and here not in info.compute_capabilities:
        raise WorkbookError(
            f"{plan} was built for compute capability {', '.join(info.compute_capabilities)} only, the "
            f"{cards[0].name} has {here}: build it again without --target, or with --target {here}."
        )
    packages.settle_tf32(info.tf32)
    return plan, info, packages.choose(info.package, cards)


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
        self, plan: Path, info: PlanInfo, package: packages.Package, *, eager: bool = False, stream: Any = None
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
        start = cuda.free_memory()
        self._runtime, self._engine = self._load(package, plan)
        loaded = cuda.free_memory()
        self.context = self._make_context(package.module, eager)
        self.weights, self.activations = start - loaded, loaded - cuda.free_memory()
        self._profile = 0

    def _load(self, package: packages.Package, plan: Path) -> tuple[Any, Any]:
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
        wanted = profiles.find_profile(self.info.profiles, batch, sequence, past)
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
