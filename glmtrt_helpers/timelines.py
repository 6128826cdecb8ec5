"""Notebook 07: the kernels that a step is made of, from a trace that was kept, with names that can be read."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from glmtrt_helpers.checkpoints import Checkpoint
from glmtrt_helpers.configs import expected_shapes
from glmtrt_helpers.errors import WorkbookError
from glmtrt_helpers.profiles import BYTES
from glmtrt_helpers.rooflines import FLOOR, LOOKS, READING, about_run, read_json
from glmtrt_helpers.speed import Report
from glmtrt_helpers.traces import Kernel

COLOURS = {"product": READING[0], "attention": LOOKS["fast"][0], "the rest": READING[1]}


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


def plot_layer(checkpoint: Checkpoint, report: Report, step: Step, about: str = "") -> Figure:
    """One layer of a recorded step on a time line, above the time in which its weights are read."""
    kernels, floor = one_layer(step), layer_floor_us(checkpoint, report)
    figure, axis = plt.subplots(figsize=(9, 1.5 + 0.24 * len(kernels)), layout="constrained")
    start, end = kernels[0].start_us, max(kernel.end_us for kernel in kernels)
    for row, kernel in enumerate(kernels):
        axis.barh([row], [kernel.duration_us], left=[kernel.start_us - start], color=COLOURS[kind_of(kernel.name)])
        axis.annotate(f"{kernel.duration_us:.1f}", (kernel.end_us - start, row), xytext=(3, 0), va="center", fontsize=8,
                      textcoords="offset points")  # fmt: skip
    axis.barh([len(kernels)], [floor], color="white", edgecolor=FLOOR, hatch="///")
    axis.annotate(f"{floor:.1f}", (floor, len(kernels)), xytext=(3, 0), va="center", fontsize=8,
                  textcoords="offset points")  # fmt: skip
    labels = [*(short_name(kernel.name) for kernel in kernels), "its weights, read once"]
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.08 * max(floor, end - start))
    axis.set_xlabel(f"microseconds, {end - start:.0f} in all ({about})")
    for kind, colour in COLOURS.items():
        axis.barh([0], [0], color=colour, label=kind)
    axis.set_title(
        f"One layer of {step.engine}: {step.phase}, batch {step.batch}, {step.past} tokens", loc="left", pad=20
    )
    axis.legend(frameon=False, ncols=3, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.1)
    plt.close(figure)
    return figure
