"""What `glmtrt bench DIR` measures: everything that can run a step of this checkpoint, with one interface.

A runner is opened, asked for steps of certain shapes, and closed before the next one is opened. Running a step again
measures the same: the cache is as long as before, or one token longer after each decode step.
"""

from __future__ import annotations

import contextlib
import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch._inductor import config as inductor

from glmtrt_helpers.bench.static_decoder import StaticDecoder
from glmtrt_helpers.chat import backends
from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.remote_code import in_remote_code
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.precisions import PRECISIONS
from glmtrt_helpers.engines import cuda, plan_info
from glmtrt_helpers.export import exporting
from glmtrt_helpers.inputs import positions_and_mask
from glmtrt_helpers.inputs.examples import empty_past
from glmtrt_helpers.inputs.names import forward_kwargs
from glmtrt_helpers.sessions.onnxruntime import OrtSession

Step = Callable[[], object]
FILLER = 6  # the token id of all text; a step takes equally long on any


def runners(checkpoint: Checkpoint, dtype: str) -> dict[str, Callable[[], Runner]]:
    """What to try on this machine, by name; calling one opens it, or raises WorkbookError where it cannot run here."""
    on_gpu = bool(tensorrt_package.gpus())
    torch_device = "cuda" if on_gpu and torch.cuda.is_available() else "cpu"
    ort_device = "cuda" if on_gpu else "cpu"
    return {
        "torch-eager": lambda: TorchEager(checkpoint, dtype, torch_device),
        "torch-graph": lambda: TorchGraph(checkpoint, dtype),
        "torch-compile": lambda: TorchCompile(checkpoint, dtype),
        f"ort-{ort_device}": lambda: Ort(checkpoint, dtype, ort_device),
        "classical": lambda: Engine(checkpoint, dtype),
        "cuda": lambda: OneKernel(checkpoint, dtype),
    }


class Runner(ABC):
    """name: as in tables and saved runs. gpu_bytes: GPU memory that opening it took, None on a CPU."""

    name: str
    dtype: str = "fp16"
    gpu_bytes: int | None = None
    load_seconds: float = 0.0

    @contextlib.contextmanager
    def _loading(self, on_gpu: bool) -> Iterator[None]:
        """Measure what the block loads: seconds, and GPU memory where it is `on_gpu`."""
        free = cuda.free_device_memory() if on_gpu else 0
        started = time.perf_counter()
        yield
        self.load_seconds = time.perf_counter() - started
        self.gpu_bytes = free - cuda.free_device_memory() if on_gpu else None

    @abstractmethod
    def step(self, batch: int, length: int, past: int) -> Step:
        """One step of these shapes, ready to be run many times. WorkbookError: it does not take them."""

    def prepare(self) -> None:
        """Reset the cache to the past of the last step that was asked for; not part of what is measured."""
        return

    def times(self, step: Step, count: int) -> list[float]:
        """Milliseconds of `count` runs back to back: a GPU gets the next one while one is still running."""
        return host_times(step, count)

    def plans(self) -> list[Path]:
        """The engine files that it runs."""
        return []

    @abstractmethod
    def close(self) -> None: ...


class TorchEager(Runner):
    """The checkpoint's own remote code, unpatched, in eager PyTorch."""

    name = "torch-eager"

    def __init__(self, checkpoint: Checkpoint, dtype: str, device: str):
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        with self._loading(device == "cuda"):
            model = loading.load_model(checkpoint, loading.DTYPES[dtype], code=checkpoint.pristine_code)
            self.model: Any = model.to(device)

    def step(self, batch: int, length: int, past: int) -> Step:
        flat = empty_past(self.checkpoint, batch, loading.DTYPES[self.dtype])
        flat = {name: tensor.new_zeros(past, *tensor.shape[1:]) for name, tensor in flat.items()}
        new = step_inputs(self.checkpoint, batch, length, past)
        flat |= {name: torch.from_numpy(array) for name, array in new.items()}
        kwargs = forward_kwargs({name: tensor.to(self.device) for name, tensor in flat.items()})

        def run() -> object:
            with torch.inference_mode(), in_remote_code():
                return self.model(**kwargs)

        return run

    def times(self, step: Step, count: int) -> list[float]:
        return (torch_times if self.device == "cuda" else host_times)(step, count)

    def close(self) -> None:
        self.model = None
        free_torch()


class TorchGraph(Runner):
    """Careful plain PyTorch: a static cache, SDPA over the used part of it, in a CUDA graph."""

    name = "torch-graph"

    def __init__(self, checkpoint: Checkpoint, dtype: str):
        if not torch.cuda.is_available():
            raise WorkbookError("CUDA graphs need an NVIDIA GPU, and PyTorch with CUDA.")
        self.checkpoint, self.dtype = checkpoint, dtype
        with self._loading(on_gpu=True):
            self.model: Any = StaticDecoder.load(checkpoint, loading.DTYPES[dtype], "cuda")

    def step(self, batch: int, length: int, past: int) -> Step:
        cache = self.model.empty_cache(batch, past + length, "cuda")
        arrays = step_inputs(self.checkpoint, batch, length, past)
        new = {name: torch.from_numpy(array).to("cuda") for name, array in arrays.items()}
        mask = None if length == 1 else new["attention_mask"]

        function = self._function()

        def run() -> object:
            return function(new["input_ids"], new["position_ids"], mask, cache, past)

        side = torch.cuda.Stream()
        with torch.inference_mode(), torch.cuda.stream(side):  # the first calls allocate what must not be captured
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            run()
        return graph.replay

    def _function(self) -> Callable[..., object]:
        step: Callable[..., object] = self.model.step
        return step

    def times(self, step: Step, count: int) -> list[float]:
        return torch_times(step, count)

    def close(self) -> None:
        self.model = None
        free_torch()


class TorchCompile(TorchGraph):
    """The same by `torch.compile`, which tries its kernels for each size: up to a minute before the first step."""

    name = "torch-compile"

    def _function(self) -> Callable[..., object]:
        inductor.coordinate_descent_tuning = True
        return torch.compile(self.model.step, mode="max-autotune-no-cudagraphs", dynamic=False)

    def close(self) -> None:
        torch._dynamo.reset()
        super().close()


class Ort(Runner):
    """The graph of notebook 03 in ONNX Runtime, inputs and outputs bound to the device: "ort-cuda" or "ort-cpu"."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, device: str):
        self.name, self.checkpoint, self.dtype, self.device = f"ort-{device}", checkpoint, dtype, device
        provider = f"{device.upper()}ExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise WorkbookError(f"ONNX Runtime's {provider} is not installed: pip install onnxruntime-gpu.")
        if device == "cpu" and checkpoint.is_large:
            raise WorkbookError("ONNX Runtime would cast all weights first, to 27 GB: see notebook 04.")
        with self._loading(device == "cuda"):
            path = exporting.onnx_path(checkpoint, dtype)
            self.session: Any = OrtSession(path, providers=[provider]).session

    def step(self, batch: int, length: int, past: int) -> Step:
        binding = self.session.io_binding()
        shape = (past, batch, self.checkpoint.num_heads, self.checkpoint.head_size)
        cache = np.zeros(shape, PRECISIONS[self.dtype])
        new = step_inputs(self.checkpoint, batch, length, past)
        for name in (value.name for value in self.session.get_inputs()):
            array = np.ascontiguousarray(new.get(name, cache))
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, self.device, 0))
        for value in self.session.get_outputs():
            binding.bind_output(value.name, self.device)

        def run() -> object:
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            return binding

        return run

    def close(self) -> None:
        self.session = None
        gc.collect()


class _OnStream(Runner):
    """A session that works in a CUDA stream of its own, timed with events in it. backend: as for `open_session`."""

    backend: str
    session: Any

    def __init__(self, checkpoint: Checkpoint, dtype: str):
        self.checkpoint, self.dtype = checkpoint, dtype
        with self._loading(bool(tensorrt_package.gpus())):
            self.session = backends.open_session(checkpoint, self.backend, dtype)

    def times(self, step: Step, count: int) -> list[float]:
        events = [cuda.new_event() for _ in range(count + 1)]
        self.prepare()
        cuda.mark(events[0], self.session.stream)
        for event in events[1:]:
            step()
            cuda.mark(event, self.session.stream)
        cuda.wait(events[-1])
        milliseconds = [cuda.elapsed_ms(first, second) for first, second in pairwise(events)]
        for event in events:
            cuda.destroy_event(event)
        return milliseconds

    def close(self) -> None:
        self.session.close()


class Engine(_OnStream):
    """The engine of notebooks 05 and 06: takes past_key_values, returns present_key_values."""

    name, backend = "classical", "tensorrt"

    def plans(self) -> list[Path]:
        return [plan_info.plan_path(self.checkpoint, self.dtype)]

    def step(self, batch: int, length: int, past: int) -> Step:
        new = step_inputs(self.checkpoint, batch, length, past)
        return lambda: self.session.enqueue(new, past)


class OneKernel(_OnStream):
    """The one-kernel engine of notebook 07; decode in its loop without the host."""

    name = backend = "cuda"
    _cache = (1, 0)  # batch and past of the last step that was asked for

    def prepare(self) -> None:
        self.session.pretend(*self._cache)

    def times(self, step: Step, count: int) -> list[float]:
        room = self.session.limits.total - self._cache[1]  # each decode step leaves a token in the cache
        return super().times(step, min(count, room))

    def step(self, batch: int, length: int, past: int) -> Step:
        session = self.session
        self._cache = batch, past
        if past:
            decode: Step = session.decode
            return decode
        new = step_inputs(self.checkpoint, batch, length, past)

        def run() -> object:
            session.reset()
            return session.enqueue(new, length)

        return run


def step_inputs(checkpoint: Checkpoint, batch: int, length: int, past: int) -> dict[str, np.ndarray]:
    """input_ids, position_ids and attention_mask of `length` new tokens after `past` ones, as in a chat.

    Without a past they are a prompt, which ends in [gMASK] and <sop>; with one, the answer after it.
    """
    end = [int(checkpoint.config[key]) for key in ("gmask_token_id", "bos_token_id")]
    if not past:
        return positions_and_mask.prefill(checkpoint, [[FILLER] * (length - 2) + end] * batch)
    whole = positions_and_mask.prefill(checkpoint, [[FILLER] * (past - 2) + end + [FILLER] * length] * batch)
    new = {name: whole[name][..., -length:] for name in ("input_ids", "position_ids")}
    return new | {"attention_mask": whole["attention_mask"][:, :, -length:]}


def host_times(step: Step, count: int) -> list[float]:
    """Milliseconds of `count` runs by the host's clock."""
    moments = [time.perf_counter()]
    for _ in range(count):
        step()
        moments.append(time.perf_counter())
    return [1000 * (later - sooner) for sooner, later in pairwise(moments)]


def torch_times(step: Step, count: int) -> list[float]:
    """Milliseconds of `count` runs by CUDA events in PyTorch's stream."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    events[-1].synchronize()
    return [float(first.elapsed_time(second)) for first, second in pairwise(events)]


def free_torch() -> None:
    """Give back the memory that PyTorch keeps for reuse."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
