"""What `glmtrt bench DIR` measures: everything that can run a step of this checkpoint, behind one interface.

A contender is opened, asked for steps of certain shapes, and closed before the next one. Its step leaves its cache as
it found it, or a token longer, so that each sample measures the same.
"""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from glmtrt_helpers.chat import backends
from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.precisions import PRECISIONS
from glmtrt_helpers.engines import cuda, plan_info
from glmtrt_helpers.engines.profiles import find_profile
from glmtrt_helpers.export import exporting
from glmtrt_helpers.fast import backends as fast_backends
from glmtrt_helpers.fast.session import PARTS, part_path
from glmtrt_helpers.fast.static_decoder import StaticDecoder
from glmtrt_helpers.fast.tensorrt import FastTensorRTSession
from glmtrt_helpers.inputs import positions_and_mask
from glmtrt_helpers.inputs.examples import empty_past
from glmtrt_helpers.inputs.names import forward_kwargs
from glmtrt_helpers.sessions.base import Session
from glmtrt_helpers.sessions.onnxruntime import OrtSession

Step = Callable[[], object]


def call(checkpoint: Checkpoint, batch: int, length: int, past: int) -> dict[str, np.ndarray]:
    """Ids, positions and mask of new tokens on a past, as a chat sends them; what they say does not matter.

    Without a past they are a prompt, which ends in [gMASK] and <sop>; with one, what is said behind it.
    """
    gmask, sop = (int(checkpoint.config[key]) for key in ("gmask_token_id", "bos_token_id"))
    filler = 6
    if not past:
        return positions_and_mask.prefill(checkpoint, [[filler] * (length - 2) + [gmask, sop]] * batch)
    whole = positions_and_mask.prefill(checkpoint, [[filler] * (past - 2) + [gmask, sop] + [filler] * length] * batch)
    new = {name: whole[name][..., -length:] for name in ("input_ids", "position_ids")}
    return new | {"attention_mask": whole["attention_mask"][:, :, -length:]}


class Runner(ABC):
    """name: as the table has it. taken: bytes on the GPU that opening it took, None on a CPU."""

    name: str
    dtype: str = "fp16"
    taken: int | None = None
    load_seconds: float = 0.0

    def prepare(self) -> None:
        """To be done before runs of the last step that was asked for, outside of what is measured."""
        return

    @abstractmethod
    def step(self, batch: int, length: int, past: int) -> Step:
        """One step of these shapes, ready to be run again and again. WorkbookError: it does not take them."""

    def times(self, step: Step, count: int) -> list[float]:
        """Milliseconds of so many runs, one behind the other: a GPU is told of the next while one is under way."""
        return host_times(step, count)

    def plans(self) -> list[Path]:
        """The engines that it runs."""
        return []

    @abstractmethod
    def close(self) -> None: ...


def host_times(step: Step, count: int) -> list[float]:
    """By the host's clock."""
    moments = [time.perf_counter()]
    for _ in range(count):
        step()
        moments.append(time.perf_counter())
    return [1000 * (later - sooner) for sooner, later in pairwise(moments)]


class TorchEager(Runner):
    """The checkpoint's own remote code, as it came, in eager PyTorch."""

    name = "torch-eager"

    def __init__(self, checkpoint: Checkpoint, dtype: str, device: str):
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        before = cuda.free_device_memory() if device == "cuda" else 0
        started = time.perf_counter()
        kind = loading.DTYPES[dtype]
        model = loading.load_model(checkpoint, kind, code=checkpoint.pristine_code)
        self.model: Any = model.to(device)
        self.load_seconds = time.perf_counter() - started
        self.taken = before - cuda.free_device_memory() if device == "cuda" else None

    def step(self, batch: int, length: int, past: int) -> Step:
        flat = empty_past(self.checkpoint, batch, loading.DTYPES[self.dtype])
        flat = {name: tensor.new_zeros(past, *tensor.shape[1:]) for name, tensor in flat.items()}
        flat |= {name: torch.from_numpy(array) for name, array in call(self.checkpoint, batch, length, past).items()}
        kwargs = forward_kwargs({name: tensor.to(self.device) for name, tensor in flat.items()})

        def run() -> object:
            with torch.inference_mode():
                return self.model(**kwargs)

        return run

    def times(self, step: Step, count: int) -> list[float]:
        return (torch_times if self.device == "cuda" else host_times)(step, count)

    def close(self) -> None:
        self.model = None
        free_torch()


def torch_times(step: Step, count: int) -> list[float]:
    """Between events in PyTorch's stream."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    events[-1].synchronize()
    return [float(first.elapsed_time(second)) for first, second in pairwise(events)]


def free_torch() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class TorchGraph(Runner):
    """What a careful reader would write in PyTorch: a static cache, SDPA over its used length, in a CUDA graph."""

    name = "torch-graph"

    def __init__(self, checkpoint: Checkpoint, dtype: str):
        if not torch.cuda.is_available():
            raise WorkbookError("CUDA graphs need an NVIDIA GPU, and PyTorch with CUDA.")
        self.checkpoint, self.dtype = checkpoint, dtype
        before, started = cuda.free_device_memory(), time.perf_counter()
        self.model: Any = StaticDecoder.load(checkpoint, loading.DTYPES[dtype], "cuda")
        self.load_seconds, self.taken = time.perf_counter() - started, before - cuda.free_device_memory()

    def step(self, batch: int, length: int, past: int) -> Step:
        cache = self.model.empty_cache(batch, past + length, "cuda")
        given = {name: torch.from_numpy(a).to("cuda") for name, a in call(self.checkpoint, batch, length, past).items()}
        mask = None if length == 1 else given["attention_mask"]

        def run() -> object:
            return self.model.step(given["input_ids"], given["position_ids"], mask, cache, past)

        side = torch.cuda.Stream()
        with torch.inference_mode(), torch.cuda.stream(side):  # what is made at the first call is not to be captured
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            run()
        return graph.replay

    def times(self, step: Step, count: int) -> list[float]:
        return torch_times(step, count)

    def close(self) -> None:
        self.model = None
        free_torch()


class Ort(Runner):
    """The classical graph in ONNX Runtime, its inputs and outputs bound to the device: "ort-cuda" or "ort-cpu"."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, device: str):
        self.name, self.checkpoint, self.dtype, self.device = f"ort-{device}", checkpoint, dtype, device
        provider = f"{device.upper()}ExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise WorkbookError(f"ONNX Runtime's {provider} is not installed: pip install onnxruntime-gpu.")
        if device == "cpu" and checkpoint.is_large:
            raise WorkbookError("ONNX Runtime would cast all weights first, to 27 GB: see notebook 04.")
        path = exporting.onnx_path(checkpoint, dtype)
        before = cuda.free_device_memory() if device == "cuda" else 0
        started = time.perf_counter()
        self.session: Any = OrtSession(path, providers=[provider]).session
        self.load_seconds = time.perf_counter() - started
        self.taken = before - cuda.free_device_memory() if device == "cuda" else None

    def step(self, batch: int, length: int, past: int) -> Step:
        binding = self.session.io_binding()
        shape = (past, batch, self.checkpoint.num_heads, self.checkpoint.head_size)
        cache = np.zeros(shape, PRECISIONS[self.dtype])
        given = call(self.checkpoint, batch, length, past)
        for name in (value.name for value in self.session.get_inputs()):
            array = np.ascontiguousarray(given.get(name, cache))
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


class _OnTensorRT(Runner):
    """Both engines: events of CUDA, in the session's own stream. open: gives the session of a backend."""

    session: Any
    open: Callable[[Checkpoint, str, str], Session]

    def __init__(self, checkpoint: Checkpoint, dtype: str):
        self.checkpoint, self.dtype = checkpoint, dtype
        before, started = cuda.free_device_memory() if tensorrt_package.gpus() else 0, time.perf_counter()
        self.session = self.open(checkpoint, "tensorrt", dtype)
        self.load_seconds, self.taken = time.perf_counter() - started, before - cuda.free_device_memory()

    def times(self, step: Step, count: int) -> list[float]:
        events = [cuda.new_event() for _ in range(count + 1)]
        self.prepare()
        cuda.mark(events[0], self.session.stream)
        for event in events[1:]:
            step()
            cuda.mark(event, self.session.stream)
        cuda.wait(events[-1])
        taken = [cuda.elapsed_ms(first, second) for first, second in pairwise(events)]
        for event in events:
            cuda.destroy_event(event)
        return taken

    def close(self) -> None:
        self.session.close()


class Classical(_OnTensorRT):
    """The engine of notebooks 05 and 06: the past goes in, past and new come out."""

    name = "classical"
    open = staticmethod(backends.open_session)

    def plans(self) -> list[Path]:
        return [plan_info.plan_path(self.checkpoint, self.dtype)]

    def step(self, batch: int, length: int, past: int) -> Step:
        given: Mapping[str, np.ndarray] = call(self.checkpoint, batch, length, past)
        return lambda: self.session.enqueue(given, past)


class Fast(_OnTensorRT):
    """The fast engine: decode as it feeds itself, in a CUDA graph."""

    name = "fast"
    open = staticmethod(fast_backends.open_session)
    _at = (1, 0)

    def prepare(self) -> None:
        self.session.pretend(*self._at)

    def times(self, step: Step, count: int) -> list[float]:
        return super().times(step, min(count, self.session.limits.total - self._at[1]))  # each leaves a token there

    def plans(self) -> list[Path]:
        return [part_path(self.checkpoint, self.dtype, part, "plan") for part in PARTS]

    def step(self, batch: int, length: int, past: int) -> Step:
        session: FastTensorRTSession = self.session
        given = call(self.checkpoint, batch, length, past)
        find_profile(session.info.profiles, batch, length, past)
        self._at = batch, past
        if not past:
            return lambda: session.enqueue(given, length)

        return session.decode


def runners(checkpoint: Checkpoint, dtype: str) -> dict[str, Callable[[], Runner]]:
    """What to try on this machine, by name; opening one raises WorkbookError where it cannot run here."""
    on_gpu = bool(tensorrt_package.gpus())
    device = "cuda" if on_gpu and torch.cuda.is_available() else "cpu"
    return {
        "torch-eager": lambda: TorchEager(checkpoint, dtype, device),
        "torch-graph": lambda: TorchGraph(checkpoint, dtype),
        f"ort-{'cuda' if on_gpu else 'cpu'}": lambda: Ort(checkpoint, dtype, "cuda" if on_gpu else "cpu"),
        "classical": lambda: Classical(checkpoint, dtype),
        "fast": lambda: Fast(checkpoint, dtype),
    }
