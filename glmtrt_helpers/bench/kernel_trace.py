"""Notebook 07: which kernels a step consists of, recorded with PyTorch's profiler and named so that they can be read.

The profiler sees everything that the process runs on the GPU, including TensorRT's kernels and those of a CUDA graph.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from glmtrt_helpers.bench.results import Report, about_run, read_json
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.config import expected_shapes
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines.memory_prediction import BYTES

# What a fused kernel of TensorRT computes, by the parts of its name; parts that only move data are layout.
_FUSED = {
    "Gath": "gather",
    "MaxrSubExp": "softmax",
    "AddCastMean": "add",
    "MeanSubMulMeanAddSqrt": "LayerNorm",
    "Tanh": "GELU",
    "ConcMulMulAdd": "rotary",
    "Topk": "top-k",
}
_LAYOUT = {"Resh", "Move", "Slic", "Tran", "Conc", "Cast", "Repl", "Etc", "Sele", "Iota"}
_WORDS = {"mul": "multiply", "div": "divide", "eql": "compare"}
_MATMULS = ("matmul", "gemm", "gemv", "nvjet", "cutlass", "splitkreduce")
_ATTENTION = ("attend", "flash", "fmha", "attention", "mha_")
_KINDS = {"matmul": "matmul", "attention": "attention", "softmax": "attention"}


@dataclass(frozen=True)
class Kernel:
    """A kernel, copy or fill on the GPU. start_us: microseconds since the first one of the recording."""

    name: str
    start_us: float
    duration_us: float

    @property
    def end_us(self) -> float:
        return self.start_us + self.duration_us


@dataclass(frozen=True)
class Step:
    """One recorded step. past: as in `results.Row`; idle_fraction: the share of its time when the GPU ran nothing."""

    engine: str
    phase: str
    batch: int
    past: int
    idle_fraction: float
    kernels: list[Kernel]


def record_kernels(step: Callable[[], object], runs: int = 5) -> list[list[Kernel]]:
    """Run a warmed-up step `runs` times without a pause; the kernels of each run.

    Raises WorkbookError where PyTorch sees no GPU, or where the runs differ.
    """
    if not torch.cuda.is_available():
        raise WorkbookError("a trace needs an NVIDIA GPU, and PyTorch with CUDA.")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(runs):
            step()
        torch.cuda.synchronize()
    return split(gpu_kernels(profiler.events()), runs)


def gpu_kernels(events: Sequence[Any]) -> list[Kernel]:
    """What ran on the GPU, in order of time, of the profiler's events; calls of the host are left out."""
    spans = [(event.time_range, event.name) for event in events if event.device_type == DeviceType.CUDA]
    spans.sort(key=lambda span: span[0].start)
    return [Kernel(name, time.start - spans[0][0].start, time.elapsed_us()) for time, name in spans]


def split(kernels: Sequence[Kernel], runs: int) -> list[list[Kernel]]:
    """Cut a recording into its runs. Raises WorkbookError where they cannot all have the same number of kernels."""
    count, rest = divmod(len(kernels), runs)
    if rest or not count:
        raise WorkbookError(f"{len(kernels)} kernels are not {runs} equal runs of a step: warm it up first.")
    return [list(kernels[start : start + count]) for start in range(0, len(kernels), count)]


def entry(engine: str, phase: str, batch: int, past: int, runs: Sequence[Sequence[Kernel]]) -> dict[str, Any]:
    """A step for the JSON of `results.save_traces`: the middle run, and how idle the GPU was over all runs."""
    middle = runs[len(runs) // 2]
    step = {"engine": engine, "phase": phase, "batch": batch, "past": past}
    step["idle_fraction"] = round(idle_fraction(runs), 4)
    step["kernels"] = [
        {
            "name": kernel.name,
            "start_us": round(kernel.start_us - middle[0].start_us, 2),
            "duration_us": round(kernel.duration_us, 2),
        }
        for kernel in middle
    ]
    return step


def idle_fraction(runs: Sequence[Sequence[Kernel]]) -> float:
    """The share of the time from the first run's start to the last run's start when the GPU ran nothing."""
    kernels = [kernel for run in runs for kernel in run]
    start, end = kernels[0].start_us, runs[-1][0].start_us
    busy, reached = 0.0, start
    for kernel in kernels:
        first, last = max(kernel.start_us, reached), min(kernel.end_us, end)
        busy += max(0.0, last - first)
        reached = max(reached, last)
    return 1 - busy / (end - start)


def load_trace(path: Path) -> tuple[list[Step], str]:
    """The recorded steps of a file of `glmtrt bench DIR --trace`, and a line about its run.

    Raises WorkbookError where the file is missing or broken.
    """
    again = f"record it with `glmtrt bench DIR --trace {path}`"
    content = read_json(path, again)
    try:
        steps = [Step(**{**step, "kernels": [Kernel(**k) for k in step["kernels"]]}) for step in content["steps"]]
        return steps, about_run(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise WorkbookError(f"{path} is not a complete trace ({error}): {again}.") from None


def find_step(steps: Sequence[Step], engine: str, phase: str = "decode", batch: int = 1, past: int = 512) -> Step:
    """The recorded step of these sizes. Raises WorkbookError that lists the recorded ones."""
    for step in steps:
        if (step.engine, step.phase, step.batch, step.past) == (engine, phase, batch, past):
            return step
    recorded = "; ".join(f"{s.engine}, {s.phase}, batch {s.batch}, {s.past} tokens" for s in steps)
    raise WorkbookError(
        f"no step of {engine}, {phase}, batch {batch}, {past} tokens was recorded: choose from {recorded}."
    )


def kernel_rows(step: Step) -> list[tuple[str, int, float, float]]:
    """(short name, count, total microseconds, share of all kernels' time), the longest first."""
    durations: dict[str, list[float]] = defaultdict(list)
    for kernel in step.kernels:
        durations[short_name(kernel.name)].append(kernel.duration_us)
    total = sum(map(sum, durations.values()))
    rows = [(name, len(each), sum(each), sum(each) / total) for name, each in durations.items()]
    return sorted(rows, key=lambda row: -row[2])


def one_layer(step: Step) -> list[Kernel]:
    """The kernels of a layer in the middle: the shortest sequence that the middle half of the step repeats.

    It begins with attention where that is a kernel of its own. Raises WorkbookError where nothing is repeated.
    """
    names = [short_name(kernel.name) for kernel in step.kernels]
    first, last = len(names) // 4, 3 * len(names) // 4
    for period in range(2, (last - first) // 2 + 1):
        if all(names[i] == names[i + period] for i in range(first, last - period)):
            starts = [i for i in range(first, first + period) if names[i] == "attention"]
            start = starts[0] if starts else first
            return list(step.kernels[start : start + period])
    raise WorkbookError(f"the {len(names)} kernels of this step contain no repeated sequence that could be a layer.")


def layer_floor_us(checkpoint: Checkpoint, report: Report, dtype: str = "fp16") -> float:
    """Microseconds that reading one layer's weights takes at the report's bandwidth."""
    shapes = expected_shapes(checkpoint.config)
    numbers = sum(math.prod(shape) for name, shape in shapes.items() if ".layers.0." in name)
    return numbers * BYTES[dtype] / report.copy_bandwidth_gb_s / 1e3


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name: "matmul", "attention" or "the rest"."""
    return _KINDS.get(short_name(name), "the rest")


def short_name(name: str) -> str:
    """What a kernel does, in a word or a few: "matmul", "LayerNorm", "multiply, add", "copy"."""
    lower = name.lower()
    if any(word in lower for word in _ATTENTION):
        return "attention"
    if any(word in lower for word in _MATMULS):
        return "matmul"
    if lower.startswith(("memcpy", "memset")):
        return "copy" if lower.startswith("memcpy") else "fill"
    fused = re.match(r"__myl_([A-Za-z]+)", name)
    if fused:
        return _fused_name(fused[1])
    plain = re.sub(r"<.*|\(.*", "", re.sub(r"^(void|static|extern)\s+", "", name)).split("::")[-1].strip()
    return plain[:32] or name[:32]


def _fused_name(parts: str) -> str:
    meanings = [meaning for part, meaning in _FUSED.items() if part in parts]
    if meanings:
        return ", ".join(meanings)
    operations = [word for word in re.findall(r"[A-Z][a-z]*", parts) if word not in _LAYOUT]
    if not operations:
        return "transpose" if "Tran" in parts else "copy"
    words = list(dict.fromkeys(_WORDS.get(word.lower(), word.lower()) for word in operations))
    return ", ".join(words[:3]) + (", ..." if len(words) > 3 else "")
