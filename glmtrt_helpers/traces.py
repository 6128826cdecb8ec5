"""A trace of what runs on the GPU during a step: every kernel and copy, when it began and what it took.

Recorded with PyTorch's profiler, which sees all that the process runs on the GPU, TensorRT's kernels and those of a
CUDA graph among them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glmtrt_helpers.errors import WorkbookError

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of the profiler's events


@dataclass(frozen=True)
class Kernel:
    """start_us: since the first kernel of the recording."""

    name: str
    start_us: float
    duration_us: float

    @property
    def end_us(self) -> float:
        return self.start_us + self.duration_us


def record(step: Callable[[], object], steps: int = 5) -> list[list[Kernel]]:
    """Run a step that is warm several times without a pause and return the kernels of each run.

    Raises WorkbookError where PyTorch sees no GPU, or where the runs differ.
    """
    if not torch.cuda.is_available():
        raise WorkbookError("a trace needs an NVIDIA GPU, and PyTorch with CUDA.")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return split(read(path), steps)


def read(path: Path) -> list[Kernel]:
    """The GPU's part of a trace in Chrome's format, in order of time."""
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    found = sorted((e["ts"], e["dur"], e["name"]) for e in events if e.get("cat") in ON_GPU)
    return [Kernel(name, start - found[0][0], duration) for start, duration, name in found]


def split(kernels: Sequence[Kernel], steps: int) -> list[list[Kernel]]:
    """One list for each of so many equal runs."""
    count, rest = divmod(len(kernels), steps)
    if rest or not count:
        raise WorkbookError(f"{len(kernels)} kernels are not {steps} equal runs of a step: let it run warm first.")
    return [list(kernels[start : start + count]) for start in range(0, len(kernels), count)]


def idle_fraction(runs: Sequence[Sequence[Kernel]]) -> float:
    """The share of the time from one step's start to the next one's in which nothing ran on the GPU."""
    kernels = [kernel for run in runs for kernel in run]
    start, end = kernels[0].start_us, runs[-1][0].start_us
    busy, reached = 0.0, start
    for kernel in kernels:
        first, last = max(kernel.start_us, reached), min(kernel.end_us, end)
        busy += max(0.0, last - first)
        reached = max(reached, last)
    return 1 - busy / (end - start)


def entry(engine: str, phase: str, batch: int, past: int, runs: Sequence[Sequence[Kernel]]) -> dict[str, Any]:
    """A step for the JSON of `speed.save_traces`: the run in the middle, and how idle the GPU was between runs."""
    middle = runs[len(runs) // 2]
    kernels = [{"name": k.name, "start_us": round(k.start_us - middle[0].start_us, 2),
                "duration_us": round(k.duration_us, 2)} for k in middle]  # fmt: skip
    about = {"engine": engine, "phase": phase, "batch": batch, "past": past}
    return {**about, "idle_fraction": round(idle_fraction(runs), 4), "kernels": kernels}
