"""`glmtrt bench DIR`: what a step costs in everything that can run it here, in one run, next to the hardware's limit.

A decode step must read every weight once, so no engine is faster than that many bytes at the memory's bandwidth, which
is measured in the same run. A prefill must do its matmuls; where they take longer, they are its floor.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from glmtrt_helpers.bench import kernel_trace
from glmtrt_helpers.bench.results import Report, Row
from glmtrt_helpers.bench.roofline import floor_ms
from glmtrt_helpers.bench.runners import Runner, Step, free_torch, host_times, runners, torch_times
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines import plan_info
from glmtrt_helpers.engines.memory_prediction import engine_weights

PASTS, PROMPTS, BATCHES = (128, 512, 1024, 2000), (128, 512, 1024), (8, 32, 64, 128)
BATCH_PAST = 512  # the past at which batches are compared
SAMPLES, WARM_UP = 30, 5
BACK_TO_BACK = 5  # decode steps enqueued at a time, as in a device-side decode loop; prompts run one at a time
# On a CPU a step of a large model takes seconds: there a measurement ends once it has a few samples.
SECONDS, FEWEST = 10.0, 3
RECORDED = ("torch-graph", "classical", "cuda")  # runners whose kernels are recorded
TRACED = (("decode", 1, 512), ("decode", 1, 2000), ("decode", 64, 512), ("prefill", 1, 512))
Size = tuple[str, int, int]  # phase, batch, past of a decode step or tokens of a prompt
Progress = Callable[[str], None]


def default_sizes(
    checkpoint: Checkpoint,
    pasts: Sequence[int] = PASTS,
    prompts: Sequence[int] = PROMPTS,
    batches: Sequence[int] = BATCHES,
) -> list[Size]:
    """What to measure of each runner, as far as the model's positions reach."""
    sizes = [("decode", 1, past) for past in pasts] + [("prefill", 1, prompt) for prompt in prompts]
    sizes += [("decode", batch, BATCH_PAST) for batch in batches]
    return [size for size in sizes if size[2] < checkpoint.max_length]


def measure(
    checkpoint: Checkpoint,
    dtype: str = "fp16",
    sizes: Sequence[Size] | None = None,
    *,
    only: Sequence[str] = (),
    samples: int = SAMPLES,
    traced: Sequence[Size] = (),
    progress: Progress = lambda phase: None,
    keep: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Measure every runner, or `only` those named, at every size that it takes; one is in memory at a time.

    sizes: `default_sizes` if None. traced: sizes at which the kernels of `RECORDED` are recorded, too.
    keep: called with the report so far after each size, so that an interruption loses no more than one.
    """
    names = list(runners(checkpoint, dtype))
    unknown = sorted(set(only) - set(names))
    if unknown:
        raise WorkbookError(f"there is no engine {unknown[0]!r} to measure here: choose {', '.join(names)}.")
    progress("copy bandwidth and matmul rate")
    report = Report(*measure_hardware(), engine_weights(checkpoint, dtype))
    free_torch()  # or what PyTorch keeps would be missing from the first runner's memory
    sizes = sizes or default_sizes(checkpoint)
    for name in [name for name in names if not only or name in only]:
        progress(f"opening {name}")
        try:
            runner = runners(checkpoint, dtype)[name]()
        except WorkbookError as error:
            report.missing[name] = str(error)
            continue
        try:
            _measure_one(checkpoint, runner, sizes, samples, traced, report, progress, keep)
        finally:
            runner.close()
    return report


def measure_hardware() -> tuple[float, float]:
    """Copy bandwidth in GB/s and matmul rate in TFLOP/s, the best of ten each: fp16 on a GPU, fp32 on a CPU."""
    on_gpu = bool(tensorrt_package.gpus()) and torch.cuda.is_available()
    device, dtype, side = ("cuda", torch.float16, 8192) if on_gpu else ("cpu", torch.float32, 2048)
    source = torch.ones(2**29 if on_gpu else 2**26, dtype=dtype, device=device)
    target = torch.empty_like(source)
    left, right = torch.ones(side, side, dtype=dtype, device=device), torch.ones(side, side, dtype=dtype, device=device)
    times = torch_times if on_gpu else host_times
    copy_ms = min(times(lambda: target.copy_(source), 1)[0] for _ in range(10))
    matmul_ms = min(times(lambda: left @ right, 1)[0] for _ in range(10))
    return 2 * source.nbytes / copy_ms / 1e6, 2 * side**3 / matmul_ms / 1e9


def _measure_one(
    checkpoint: Checkpoint,
    runner: Runner,
    sizes: Sequence[Size],
    samples: int,
    traced: Sequence[Size],
    report: Report,
    progress: Progress,
    keep: Callable[[Report], None],
) -> None:
    build: dict[str, Any] = {"engine": runner.name, "load_seconds": runner.load_seconds}
    infos = [plan_info.read_info(plan) for plan in runner.plans()]
    if infos:
        build |= {"build_seconds": sum(i.seconds for i in infos), "plan_bytes": sum(i.plan_bytes for i in infos)}
    report.build.append(build)
    if runner.gpu_bytes is not None:
        report.memory.append({"engine": runner.name, "bytes": runner.gpu_bytes})
    for phase, batch, past in sizes:
        title = f"{phase}, batch {batch}, {past} tokens"
        progress(f"{runner.name}: {title}")
        is_decode = phase == "decode"
        length = 1 if is_decode else past
        try:
            step = runner.step(batch, length, past if is_decode else 0)
            times = sample(runner, step, samples, BACK_TO_BACK if is_decode else 1)
            if (phase, batch, past) in traced and runner.name in RECORDED:
                report.traces.append(_trace(runner, step, (phase, batch, past)))
        except WorkbookError as error:
            report.missing[f"{runner.name}, {title}"] = str(error)
            continue
        median = statistics.median(times)
        floor_fraction = floor_ms(checkpoint, report, phase, batch, past) / median
        rate = 1000 * batch * length / median
        report.rows.append(Row(runner.name, phase, batch, past, runner.dtype, times, median, rate, floor_fraction))
        keep(report)


def sample(runner: Runner, step: Step, samples: int, back_to_back: int = 1) -> list[float]:
    """Milliseconds of each run, after warming up; a GPU gets `back_to_back` runs at a time.

    On a CPU fewer than `samples` where a step takes long.
    """
    times: list[float] = []
    if tensorrt_package.gpus():
        warm = 0
        while warm < WARM_UP:
            warm += len(runner.times(step, back_to_back))
        while len(times) < samples:
            times += runner.times(step, back_to_back)
        return times[:samples]
    for number in range(WARM_UP + samples):
        milliseconds = runner.times(step, 1)[0]
        if number >= WARM_UP or milliseconds > 1000 * SECONDS / FEWEST:
            times.append(milliseconds)
        if len(times) == samples or (len(times) >= FEWEST and sum(times) > 1000 * SECONDS):
            break
    return times


def _trace(runner: Runner, step: Step, size: Size) -> dict[str, Any]:
    """The kernels of a step. Decode steps follow each other as in a chat; each prefill starts from an empty cache."""

    def from_empty() -> None:
        runner.prepare()
        step()

    runner.prepare()
    runs = kernel_trace.record_kernels(step if size[0] == "decode" else from_empty)
    return kernel_trace.entry(runner.name, *size, runs)
