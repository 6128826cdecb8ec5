"""The `tensorrt` backend: an engine on the GPU, with a cache of two buffers there that swap roles at each step.

No PyTorch: memory, stream and copies are CUDA's own, through cuda-python. At each step the host sends ids, positions
and mask, and reads back one row of logits per sequence; the cache never leaves the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.tensorrt_package import Package
from glmtrt_helpers.engines import cuda
from glmtrt_helpers.engines.memory_prediction import EngineMemory
from glmtrt_helpers.engines.plan_info import PlanInfo, check_plan, plan_path
from glmtrt_helpers.engines.runner import Engine, limits
from glmtrt_helpers.inputs.names import PAST, PRESENT, STEP_INPUTS
from glmtrt_helpers.sessions.base import Session


class TensorRTSession(Session):
    """An engine, and the buffers of its inputs, its logits and the cache. measured: bytes taken on the GPU."""

    backend = "tensorrt"

    @classmethod
    def open(cls, checkpoint: Checkpoint, dtype: str = "fp16", plan: Path | None = None) -> TensorRTSession:
        """The session of a working copy's engine. Raises WorkbookError as `plan_info.check_plan` does."""
        return cls(*check_plan(checkpoint, plan or plan_path(checkpoint, dtype)))

    def __init__(self, plan: Path, info: PlanInfo, package: Package):
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
        """Divide one piece of memory among the inputs of a step, the logits, and two buffers per tensor of the cache.

        Returns the bytes of the cache.
        """
        profiles, itemsize = self.info.profiles, self._engine.itemsize
        sizes = {}
        for name in STEP_INPUTS:
            largest = max(np.prod(shapes[-1]) for shapes in self._tensors[name].profiles)
            sizes[name] = int(largest) * itemsize(name)
        rows = max(profile.batch.max * profile.sequence.max for profile in profiles)
        sizes["logits"] = rows * self._tensors["logits"].shape[-1] * itemsize("logits")
        tokens = max(profile.batch.max * (profile.past.max + profile.sequence.max) for profile in profiles)
        for name in self._layers:
            per_token = int(np.prod(self._tensors[name].shape[2:])) * itemsize(name)
            sizes |= {f"{name}/{side}": tokens * per_token for side in (0, 1)}
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
        row = vocabulary * self._engine.itemsize("logits")
        logits = np.empty((batch, vocabulary), self.dtype)
        last = self._buffers["logits"].address + (sequence - 1) * row
        cuda.read_rows(logits, last, sequence * row, self.stream)
        return logits.astype(np.float32)

    def run(self, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """One call with its past from the host and every output copied back to it; forgets the cache."""
        call = {name: np.ascontiguousarray(value) for name, value in flat.items()}
        for name in self._layers:
            self._buffers[f"{name}/{self._side}"].fill(call[name], self.stream)
        self._bind(call, len(call[self._layers[0]]))
        names = [tensor.name for tensor in self.info.tensors if tensor.mode == "output"]
        inner = [name for name in names if name != "logits" and not name.startswith(PRESENT)]  # of `mark_layers`
        memory = {}
        try:
            for name in inner:
                memory[name] = cuda.DeviceMemory(self._empty(name).nbytes, name)
                self._engine.bind(name, memory[name].address)
            self._engine.enqueue()
            return {name: self._read(name) for name in names}
        finally:
            for piece in memory.values():
                piece.free()
            self.reset()

    def _empty(self, name: str) -> np.ndarray:
        """An array for an output of the shapes that are bound."""
        return np.empty(tuple(self._engine.context.get_tensor_shape(name)), self._tensors[name].dtype)

    def _read(self, name: str) -> np.ndarray:
        array = self._empty(name)
        address = self._engine.context.get_tensor_address(name)
        cuda.read_rows(array.reshape(1, -1), address, array.nbytes, self.stream)
        return array

    def enqueue(self, call: Mapping[str, np.ndarray], past: int) -> None:
        """Send the inputs of a call and run it after `past` tokens of the cache; waits for nothing."""
        self._bind(call, past)
        self._engine.enqueue()

    def _bind(self, call: Mapping[str, np.ndarray], past: int) -> None:
        """Send the inputs of a call, and give the engine the addresses of inputs, cache and logits."""
        batch, sequence = call["input_ids"].shape
        self._engine.select(batch, sequence, past)
        for name in STEP_INPUTS:
            array = np.ascontiguousarray(call[name], dtype=self._tensors[name].dtype)
            self._buffers[name].fill(array, self.stream)
            self._engine.bind(name, self._buffers[name].address, array.shape)
        for name in self._layers:
            source, target = (self._buffers[f"{name}/{side}"].address for side in (self._side, 1 - self._side))
            self._engine.bind(name, source, (past, batch, *self._tensors[name].shape[2:]))
            self._engine.bind(name.replace(PAST, PRESENT), target)
        self._engine.bind("logits", self._buffers["logits"].address)

    def close(self) -> None:
        """Free everything on the GPU."""
        self._memory.free()
        self._buffers.clear()
        self._engine.close()
