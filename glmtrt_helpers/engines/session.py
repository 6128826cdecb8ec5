"""The `tensorrt` backend: an engine on the GPU, its cache kept there in two buffers that swap roles at each step.

No PyTorch: memory, stream and copies are CUDA's own, through cuda-python. Per step the host sends ids, positions and
mask, and reads back one row of logits per sequence; the cache never leaves the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines import cuda, plan_info
from glmtrt_helpers.engines.memory_prediction import EngineMemory
from glmtrt_helpers.engines.plan_info import PlanInfo, Tensor, check_plan
from glmtrt_helpers.engines.runner import Engine, limits
from glmtrt_helpers.inputs.names import PAST, PRESENT, STEP_INPUTS
from glmtrt_helpers.sessions.base import Session


class TensorRTSession(Session):
    """An engine with its execution context, a stream and all its buffers. measured: bytes taken on the GPU."""

    backend = "tensorrt"

    @classmethod
    def open(cls, checkpoint: Checkpoint, dtype: str = "fp16", plan: Path | None = None) -> TensorRTSession:
        """The engine of a working copy, once it is clear that it may be used here."""
        return cls(*cls.check(checkpoint, dtype, plan))

    @staticmethod
    def check(
        checkpoint: Checkpoint, dtype: str = "fp16", plan: Path | None = None
    ) -> tuple[Path, PlanInfo, tensorrt_package.Package]:
        """The plan, its JSON and the package that runs it. The JSON is asked before any GPU is looked for."""
        return check_plan(checkpoint, plan or plan_info.plan_path(checkpoint, dtype))

    def __init__(self, plan: Path, info: PlanInfo, package: tensorrt_package.Package):
        self._engine = Engine(plan, info, package)
        self.info, self.stream = info, self._engine.stream
        self._tensors = self._engine.tensors
        self._layers = [name for name in self._tensors if name.startswith(PAST)]
        self.dtype = np.dtype(self._tensors["logits"].dtype)
        self.arithmetic = "tf32" if info.dtype == "fp32" and info.tf32 else None
        self._past, self._side, self._batch = 0, 0, 0
        self.limits = limits(info)
        ready = cuda.free_device_memory()
        cache = self._allocate()
        self.measured = EngineMemory(
            self._engine.weights, cache, ready - cuda.free_device_memory() - cache, self._engine.activations
        )

    def _allocate(self) -> int:
        """One piece of memory with a place for each input of a step, the logits, and twice each tensor of the cache.

        Returns the bytes of the cache.
        """
        boxes = self.info.profiles
        sizes = {}
        for name in STEP_INPUTS:
            largest = max(np.prod(shapes[-1]) for shapes in self._tensors[name].profiles)
            sizes[name] = int(largest) * self._engine.width(name)
        rows = max(box.batch.max * box.sequence.max for box in boxes)
        sizes["logits"] = rows * self._tensors["logits"].shape[-1] * self._engine.width("logits")
        tokens = max(box.batch.max * (box.past.max + box.sequence.max) for box in boxes)
        for name in self._layers:
            row = int(np.prod(self._tensors[name].shape[2:])) * self._engine.width(name)
            sizes |= {f"{name}/{side}": tokens * row for side in (0, 1)}
        self._memory = cuda.DeviceMemory(sum(map(cuda.aligned, sizes.values())), "the cache, the inputs and the logits")
        self._buffers = self._memory.divide(sizes)
        return sum(nbytes for name, nbytes in sizes.items() if name.startswith(PAST))

    @property
    def past(self) -> int:
        """Tokens in the cache."""
        return self._past

    @property
    def profile(self) -> str:
        """Name of the profile that the last call ran in."""
        return self._engine.profile

    def reset(self) -> None:
        self._past = 0

    def empty_past(self, batch: int) -> dict[str, np.ndarray]:
        shapes = {name: self._tensors[name].shape for name in self._layers}
        return {name: np.zeros((0, batch, *shape[2:]), self.dtype) for name, shape in shapes.items()}

    def step(self, call: Mapping[str, np.ndarray]) -> np.ndarray:
        batch, sequence = call["input_ids"].shape
        if self._past and batch != self._batch:
            raise WorkbookError(f"the cache holds {self._batch} rows, the call has {batch}: reset the session first.")
        self.enqueue(call, self._past)
        self._past, self._batch, self._side = self._past + sequence, batch, 1 - self._side
        vocabulary = self._tensors["logits"].shape[-1]
        row = vocabulary * self._engine.width("logits")
        logits = np.empty((batch, vocabulary), self.dtype)
        last = self._buffers["logits"].address + (sequence - 1) * row
        cuda.read_rows(logits, last, sequence * row, self.stream)
        return logits.astype(np.float32)

    def run(self, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """One call with its past from the host and every output back on it; forgets the cache."""
        host = {name: np.ascontiguousarray(value) for name, value in flat.items()}
        for name in self._layers:
            self._buffers[f"{name}/{self._side}"].fill(host[name], self.stream)
        extra: dict[str, cuda.DeviceMemory] = {}
        try:
            self.enqueue(host, len(host[self._layers[0]]), extra)
            outputs = {}
            for name in (tensor.name for tensor in self.info.tensors if tensor.mode == "output"):
                array = np.empty(tuple(self._engine.context.get_tensor_shape(name)), self._tensors[name].dtype)
                address = self._engine.context.get_tensor_address(name)
                cuda.read_rows(array.reshape(1, -1), address, array.nbytes, self.stream)
                outputs[name] = array
            return outputs
        finally:
            for memory in extra.values():
                memory.free()
            self.reset()

    def enqueue(
        self, call: Mapping[str, np.ndarray], past: int, extra: dict[str, cuda.DeviceMemory] | None = None
    ) -> None:
        """Send the inputs of a call, bind the cache and enqueue. extra: takes buffers of further outputs."""
        batch, sequence = call["input_ids"].shape
        engine = self._engine
        engine.select(batch, sequence, past)
        for name in STEP_INPUTS:
            array = np.ascontiguousarray(call[name], dtype=self._tensors[name].dtype)
            self._buffers[name].fill(array, self.stream)
            engine.bind(name, self._buffers[name].address, array.shape)
        for name in self._layers:
            here, there = (self._buffers[f"{name}/{side}"].address for side in (self._side, 1 - self._side))
            engine.bind(name, here, (past, batch, *self._tensors[name].shape[2:]))
            engine.bind(name.replace(PAST, PRESENT), there)
        engine.bind("logits", self._buffers["logits"].address)
        for tensor in self._further_outputs() if extra is not None else ():
            nbytes = int(np.prod(tuple(engine.context.get_tensor_shape(tensor.name)))) * engine.width(tensor.name)
            assert extra is not None
            extra[tensor.name] = cuda.DeviceMemory(nbytes, tensor.name)
            engine.bind(tensor.name, extra[tensor.name].address)
        engine.enqueue()

    def _further_outputs(self) -> list[Tensor]:
        """Outputs that are neither logits nor cache: the tensors that `mark_layers` made visible."""
        outputs = (tensor for tensor in self.info.tensors if tensor.mode == "output")
        return [tensor for tensor in outputs if tensor.name != "logits" and not tensor.name.startswith(PRESENT)]

    def close(self) -> None:
        """Free everything on the GPU."""
        self._memory.free()
        self._buffers.clear()
        self._engine.close()
