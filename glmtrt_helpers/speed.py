"""`glmtrt bench DIR`: what a step costs in everything that can run it here, in one run, against the hardware's floor.

A decode step has to read every weight once; no engine is faster than that many bytes at the memory's bandwidth, which
is measured in the same run. A prefill has to multiply; its floor is that of its products where that is higher.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glmtrt_helpers import bench, packages, plans, traces
from glmtrt_helpers.checkpoints import Checkpoint
from glmtrt_helpers.configs import expected_shapes
from glmtrt_helpers.contenders import Contender, Step, contenders, free_torch, host_times, torch_times
from glmtrt_helpers.errors import WorkbookError
from glmtrt_helpers.files import replacing
from glmtrt_helpers.profiles import engine_weights

PASTS, PROMPTS, BATCHES = (128, 512, 1024, 2000), (128, 512, 1024), (8, 32, 64, 128)
BATCH_PAST = 512  # the past at which batches are compared
SAMPLES, WARM_UP = 30, 5
TOGETHER = 5  # decode steps that are sent one behind the other, as a decoder that feeds itself does; prompts come alone
# On a CPU a step of a large model takes seconds: there a measurement ends once it has a few samples.
SECONDS, FEWEST = 10.0, 3

ENGINES = ("classical", "fast")
TRACED = (("decode", 1, 512), ("decode", 1, 2000), ("decode", 64, 512), ("prefill", 1, 512))

Size = tuple[str, int, int]  # phase, batch, past of a decode or tokens of a prompt


@dataclass(frozen=True)
class Row:
    """One measurement. past: tokens in the cache of a decode, tokens of the prompt of a prefill."""

    engine: str
    phase: str
    batch: int
    past: int
    dtype: str
    samples_ms: list[float]
    median_ms: float
    tokens_per_s: float
    floor_fraction: float


@dataclass
class Report:
    """A run. bandwidth: GB a second, read and written bytes of a copy both counted; matrix rate: of a large product.

    missing: what could not run, or not at a size, and why. traces: as `traces.entry` makes them; kept apart.
    """

    copy_bandwidth_gb_s: float
    matrix_tflop_s: float
    weights_bytes: int
    rows: list[Row] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    build: list[dict[str, Any]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    traces: list[dict[str, Any]] = field(default_factory=list)


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
    on_gpu = bool(packages.gpus()) and torch.cuda.is_available()
    device, kind, side = ("cuda", torch.float16, 8192) if on_gpu else ("cpu", torch.float32, 2048)
    source = torch.ones(2**29 if on_gpu else 2**26, dtype=kind, device=device)
    target = torch.empty_like(source)
    left, right = torch.ones(side, side, dtype=kind, device=device), torch.ones(side, side, dtype=kind, device=device)
    timed = torch_times if on_gpu else host_times
    copied = min(timed(lambda: target.copy_(source), 1)[0] for _ in range(10))
    multiplied = min(timed(lambda: left @ right, 1)[0] for _ in range(10))
    return 2 * source.nbytes / copied / 1e6, 2 * side**3 / multiplied / 1e9


def weight_products(checkpoint: Checkpoint, phase: str, batch: int, past: int) -> int:
    """Floating-point operations of a step's products with weights; past of a prefill: tokens of the prompt."""
    shapes = expected_shapes(checkpoint.config)
    layers = sum(int(np.prod(shape)) for name, shape in shapes.items() if ".layers." in name and len(shape) == 2)
    head = checkpoint.vocab_size * checkpoint.hidden_size  # wanted for one token of a sequence
    tokens = batch * (past if phase == "prefill" else 1)
    return 2 * (layers * tokens + head * batch)


def floor_ms(checkpoint: Checkpoint, report: Report, phase: str, batch: int, past: int) -> float:
    """The least that a step can take: its weights read once, or its products made, whichever is longer.

    The cache is left out, so that the floor of a long past or a large batch is a little lower than what is possible.
    """
    read = report.weights_bytes / report.copy_bandwidth_gb_s / 1e6
    return max(read, weight_products(checkpoint, phase, batch, past) / report.matrix_tflop_s / 1e9)


def sample(contender: Contender, step: Step, samples: int, together: int = 1) -> list[float]:
    """Milliseconds of each run, warmed up; `together` are sent to a GPU at a time.

    On a CPU fewer than asked for where a step takes long.
    """
    taken: list[float] = []
    if packages.gpus():
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
    makers = contenders(checkpoint, dtype)
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
            turns = [(make, [size for size in wanted if size[1] == 1]), (contenders(rows_of, dtype)[name], several)]
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
    contender: Contender,
    wanted: Sequence[Size],
    samples: int,
    traced: Sequence[Size],
    report: Report,
    progress: Callable[[str], None],
) -> None:
    build: dict[str, Any] = {"engine": contender.name, "load_seconds": contender.load_seconds}
    infos = [plans.read_info(plan) for plan in contender.plans()]
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


def _trace(contender: Contender, step: Step, size: Size) -> dict[str, Any]:
    """The kernels of a step. Decode steps follow each other as in a chat; a prefill starts anew each time."""

    def anew() -> None:
        contender.prepare()
        step()

    contender.prepare()
    return traces.entry(contender.name, *size, traces.record(step if size[0] == "decode" else anew))


def save(path: Path, checkpoint: Checkpoint, report: Report, command: str) -> None:
    """Keep a run as JSON, with what it was made on."""
    content = asdict(report)
    del content["traces"]
    _write(path, command, {"layers": checkpoint.num_layers, **content})


def save_traces(path: Path, report: Report, command: str) -> None:
    """Keep the recorded kernels of a run as JSON."""
    _write(path, command, {"steps": report.traces})


def _write(path: Path, command: str, content: dict[str, Any]) -> None:
    here = bench.machine()
    about = {"gpu": here.pop("gpu"), "driver": packages.driver_version(), "versions": here.pop("versions")}
    entry = {**about, "commit": _commit(), "command": command, **here, **content}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(entry, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _commit() -> str | None:
    """Of this package's own repository, with a mark where its files were changed since."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
