"""`glmtrt bench DIR`: what a step costs in everything that can run it here, in one run, against the hardware's floor.

A decode step has to read every weight once; no engine is faster than that many bytes at the memory's bandwidth, which
is measured in the same run. A prefill has to multiply; its floor is that of its products where that is higher.
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
TOGETHER = 5  # decode steps that are sent one behind the other, as a decoder that feeds itself does; prompts come alone
# On a CPU a step of a large model takes seconds: there a measurement ends once it has a few samples.
SECONDS, FEWEST = 10.0, 3
ENGINES = ("classical", "fast")
TRACED = (("decode", 1, 512), ("decode", 1, 2000), ("decode", 64, 512), ("prefill", 1, 512))
Size = tuple[str, int, int]  # phase, batch, past of a decode or tokens of a prompt


def sizes(
    checkpoint: Checkpoint,
    pasts: Sequence[int] = PASTS,
    prompts: Sequence[int] = PROMPTS,
    batches: Sequence[int] = BATCHES,
) -> list[Size]:
    """What to measure of each contender, as far as the model's positions go."""
    wanted = [("decode", 1, past) for past in pasts] + [("prefill", 1, prompt) for prompt in prompts]
    wanted += [("decode", batch, BATCH_PAST) for batch in batches]
    return [size for size in wanted if size[2] < checkpoint.max_length]


def measure_hardware() -> tuple[float, float]:
    """Copy bandwidth in GB/s and the rate of products in TFLOP/s, the best of ten: fp16 on a GPU, fp32 on a CPU."""
    on_gpu = bool(tensorrt_package.gpus()) and torch.cuda.is_available()
    device, kind, side = ("cuda", torch.float16, 8192) if on_gpu else ("cpu", torch.float32, 2048)
    source = torch.ones(2**29 if on_gpu else 2**26, dtype=kind, device=device)
    target = torch.empty_like(source)
    left, right = torch.ones(side, side, dtype=kind, device=device), torch.ones(side, side, dtype=kind, device=device)
    timed = torch_times if on_gpu else host_times
    copied = min(timed(lambda: target.copy_(source), 1)[0] for _ in range(10))
    multiplied = min(timed(lambda: left @ right, 1)[0] for _ in range(10))
    return 2 * source.nbytes / copied / 1e6, 2 * side**3 / multiplied / 1e9


def sample(contender: Runner, step: Step, samples: int, together: int = 1) -> list[float]:
    """Milliseconds of each run, warmed up; `together` are sent to a GPU at a time.

    On a CPU fewer than asked for where a step takes long.
    """
    taken: list[float] = []
    if tensorrt_package.gpus():
        warm = 0
        while warm < WARM_UP:
            warm += len(contender.times(step, together))
        while len(taken) < samples:
            taken += contender.times(step, together)
        return taken[:samples]
    for number in range(WARM_UP + samples):
        took = contender.times(step, 1)[0]
        if number >= WARM_UP or took > 1000 * SECONDS / FEWEST:
            taken.append(took)
        if len(taken) == samples or (len(taken) >= FEWEST and sum(taken) > 1000 * SECONDS):
            break
    return taken


def measure(
    checkpoint: Checkpoint,
    dtype: str = "fp16",
    wanted: Sequence[Size] | None = None,
    *,
    only: Sequence[str] = (),
    samples: int = SAMPLES,
    rows_of: Checkpoint | None = None,
    traced: Sequence[Size] = (),
    progress: Callable[[str], None] = lambda phase: None,
) -> Report:
    """Measure every contender, or `only` those named, at every size that it takes; one is in memory at a time.

    rows_of: a working copy whose engines take several rows, for the sizes that have them. traced: sizes at which the
    engines' kernels are recorded, too.
    """
    makers = runners(checkpoint, dtype)
    unknown = sorted(set(only) - set(makers))
    if unknown:
        raise WorkbookError(f"there is no engine {unknown[0]!r} to measure here: choose {', '.join(makers)}.")
    progress("copy bandwidth and products")
    report = Report(*measure_hardware(), engine_weights(checkpoint, dtype))
    free_torch()  # or what PyTorch holds back would be missing from what the first contender takes
    wanted = wanted or sizes(checkpoint)
    for name, make in makers.items():
        if only and name not in only:
            continue
        turns = [(make, wanted)]
        if rows_of and name in ENGINES:
            several = [size for size in wanted if size[1] > 1]
            turns = [(make, [size for size in wanted if size[1] == 1]), (runners(rows_of, dtype)[name], several)]
        for make_this, these in turns:
            progress(f"opening {name}")
            try:
                contender = make_this()
            except WorkbookError as error:
                report.missing[name + (", several rows" if make_this is not make else "")] = str(error)
                continue
            try:
                _measure_one(checkpoint, contender, these, samples, traced, report, progress)
            finally:
                contender.close()
    return report


def _measure_one(
    checkpoint: Checkpoint,
    contender: Runner,
    wanted: Sequence[Size],
    samples: int,
    traced: Sequence[Size],
    report: Report,
    progress: Callable[[str], None],
) -> None:
    build: dict[str, Any] = {"engine": contender.name, "load_seconds": contender.load_seconds}
    infos = [plan_info.read_info(plan) for plan in contender.plans()]
    if infos:
        build |= {"build_seconds": sum(i.seconds for i in infos), "plan_bytes": sum(i.plan_bytes for i in infos)}
    report.build.append(build)
    if contender.taken is not None:
        report.memory.append({"engine": contender.name, "bytes": contender.taken})
    for phase, batch, past in wanted:
        progress(f"{contender.name}: {phase}, batch {batch}, {past} tokens")
        length = 1 if phase == "decode" else past
        try:
            step = contender.step(batch, length, past if phase == "decode" else 0)
            taken = sample(contender, step, samples, TOGETHER if phase == "decode" else 1)
            if (phase, batch, past) in traced and contender.name in ENGINES:
                report.traces.append(_trace(contender, step, (phase, batch, past)))
        except WorkbookError as error:
            report.missing[f"{contender.name}, {phase}, batch {batch}, {past} tokens"] = str(error)
            continue
        median, rate = statistics.median(taken), 1000 * batch * length / statistics.median(taken)
        reached = floor_ms(checkpoint, report, phase, batch, past) / median
        report.rows.append(Row(contender.name, phase, batch, past, contender.dtype, taken, median, rate, reached))


def _trace(contender: Runner, step: Step, size: Size) -> dict[str, Any]:
    """The kernels of a step. Decode steps follow each other as in a chat; a prefill starts anew each time."""

    def anew() -> None:
        contender.prepare()
        step()

    contender.prepare()
    return kernel_trace.entry(contender.name, *size, kernel_trace.record_kernels(step if size[0] == "decode" else anew))
