"""Notebook 07: the kernels that a step is made of, from a trace that was kept, with names that can be read.

A trace of what runs on the GPU during a step: every kernel and copy, when it began and what it took.

Recorded with PyTorch's profiler, which sees all that the process runs on the GPU, TensorRT's kernels and those of a
CUDA graph among them.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glmtrt_helpers.bench.results import Report, about_run, read_json
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.config import expected_shapes
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines.memory_prediction import BYTES


@dataclass(frozen=True)
class Step:
    """One recorded step of a `trace`. idle_fraction: of its time, in which nothing ran on the GPU."""

    engine: str
    phase: str
    batch: int
    past: int
    idle_fraction: float
    kernels: list[Kernel]


def load_trace(path: Path) -> tuple[list[Step], str]:
    """The kernels of recorded steps, and on what they ran. WorkbookError: missing or broken."""
    again = f"record it with `glmtrt bench DIR --trace {path}`"
    entry = read_json(path, again)
    try:
        steps = [Step(**{**step, "kernels": [Kernel(**k) for k in step["kernels"]]}) for step in entry["steps"]]
        return steps, about_run(entry)
    except (KeyError, TypeError, AttributeError) as error:
        raise WorkbookError(f"{path} is no whole trace ({error}): {again}.") from None


def find_step(steps: Sequence[Step], engine: str, phase: str = "decode", batch: int = 1, past: int = 512) -> Step:
    """The recorded step of these sizes; WorkbookError names those that there are."""
    for step in steps:
        if (step.engine, step.phase, step.batch, step.past) == (engine, phase, batch, past):
            return step
    there = "; ".join(f"{s.engine}, {s.phase}, batch {s.batch}, {s.past} tokens" for s in steps)
    raise WorkbookError(f"no step of {engine}, {phase}, batch {batch}, {past} tokens was recorded: choose of {there}.")


# What a fused kernel of TensorRT's is for, by what it does on the way; and steps that only put numbers elsewhere.
_FUSED = {
    "Gath": "look-up",
    "MaxrSubExp": "softmax",
    "AddCastMean": "add",
    "MeanSubMulMeanAddSqrt": "LayerNorm",
    "Tanh": "GELU",
    "ConcMulMulAdd": "rotary",
    "Topk": "choose the best",
}
_LAYOUT = {"Resh", "Move", "Slic", "Tran", "Conc", "Cast", "Repl", "Etc", "Sele", "Iota"}
_WORDS = {"mul": "multiply", "div": "divide", "eql": "compare"}
_PRODUCTS = ("matmul", "gemm", "gemv", "nvjet", "cutlass", "splitkreduce")
_ATTENTION = ("attend", "flash", "fmha", "attention", "mha_")
_OF_ATTENTION = ("attend", "attention", "softmax")


def short_name(name: str) -> str:
    """What a kernel is, in a word or four: "product", "LayerNorm", "multiply, add", "copy", "attend"."""
    lower = name.lower()
    if any(word in lower for word in _ATTENTION):
        return "attend" if re.fullmatch(r"\W*attend\W*", name) else "attention"
    if any(word in lower for word in _PRODUCTS):
        return "product"
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
    done = [word for word in re.findall(r"[A-Z][a-z]*", parts) if word not in _LAYOUT]
    if not done:
        return "transpose" if "Tran" in parts else "copy"
    words = list(dict.fromkeys(_WORDS.get(word.lower(), word.lower()) for word in done))
    return ", ".join(words[:3]) + (", ..." if len(words) > 3 else "")


def kind_of(name: str) -> str:
    """product, attention or the rest, by a kernel's name."""
    short = short_name(name)
    return short if short == "product" else "attention" if short in _OF_ATTENTION else "the rest"


def kernel_rows(step: Step) -> list[tuple[str, int, float, float]]:
    """(short name, how many, microseconds in all, share of all), the longest first."""
    taken: dict[str, list[float]] = defaultdict(list)
    for kernel in step.kernels:
        taken[short_name(kernel.name)].append(kernel.duration_us)
    total = sum(map(sum, taken.values()))
    rows = [(name, len(each), sum(each), sum(each) / total) for name, each in taken.items()]
    return sorted(rows, key=lambda row: -row[2])


def one_layer(step: Step) -> list[Kernel]:
    """The kernels of a layer in the middle: the shortest sequence that the middle half of the step repeats.

    It begins with attention where that is a kernel of its own. Raises WorkbookError where nothing is repeated.
    """
    names = [short_name(kernel.name) for kernel in step.kernels]
    first, last = len(names) // 4, 3 * len(names) // 4
    for period in range(2, (last - first) // 2 + 1):
        if all(names[i] == names[i + period] for i in range(first, last - period)):
            starts = [i for i in range(first, first + period) if names[i] == "attend"]
            start = starts[0] if starts else first
            return list(step.kernels[start : start + period])
    raise WorkbookError(f"the {len(names)} kernels of this step repeat nothing that could be a layer.")


def layer_floor_us(checkpoint: Checkpoint, report: Report, dtype: str = "fp16") -> float:
    """Microseconds in which the weights of one layer are read."""
    shapes = expected_shapes(checkpoint.config)
    numbers = sum(math.prod(shape) for name, shape in shapes.items() if ".layers.0." in name)
    return numbers * BYTES[dtype] / report.copy_bandwidth_gb_s / 1e3


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


def record_kernels(step: Callable[[], object], steps: int = 5) -> list[list[Kernel]]:
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
    """A step for the JSON of `results.save_traces`: the run in the middle, and how idle the GPU was between runs."""
    middle = runs[len(runs) // 2]
    kernels = [{"name": k.name, "start_us": round(k.start_us - middle[0].start_us, 2),
                "duration_us": round(k.duration_us, 2)} for k in middle]  # fmt: skip
    about = {"engine": engine, "phase": phase, "batch": batch, "past": past}
    return {**about, "idle_fraction": round(idle_fraction(runs), 4), "kernels": kernels}
