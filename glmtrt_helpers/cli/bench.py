"""The commands of `glmtrt bench`: `glmtrt bench DIR` measures speed, `glmtrt bench memory DIR` memory.

Each command imports what it needs itself, so that `glmtrt --help` starts quickly.
"""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.core import TyperGroup

from glmtrt_helpers.bench.phases import Phase
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.progress import say
from glmtrt_helpers.core.text import tell


class _SpeedByDefault(TyperGroup):
    """A first word that is no command is the folder that `speed` measures."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["speed", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_SpeedByDefault, no_args_is_help=True, help="Measure speed (the default) or memory.")
Directory = Annotated[Path, typer.Argument(help="a working copy, models/run/NAME")]


@app.command()
def speed(
    directory: Directory,
    dtype: Annotated[Literal["fp16", "fp32"], typer.Option()] = "fp16",
    output: Annotated[Path | None, typer.Option(help="save the measurement as JSON")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="measure only this one; repeatable")] = None,
    past: Annotated[
        list[int] | None,
        typer.Option(min=1, help="tokens in the cache of a decode step, at least [gMASK] and <sop>; repeatable"),
    ] = None,
    prompt: Annotated[
        list[int] | None, typer.Option(min=2, help="tokens of a prefill, these two among them; repeatable")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="batch of a decode step at past 512; repeatable")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="samples of each measurement")] = 30,
    trace: Annotated[Path | None, typer.Option(help="also record the engines' kernels and save them as JSON")] = None,
) -> None:
    """Measure milliseconds per step of every backend here.

    Each is shown as a part of what the hardware allows at best.
    """
    from glmtrt_helpers.bench import results, speed
    from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
    from glmtrt_helpers.core.display import print_table
    from glmtrt_helpers.core.files import check_writable

    checkpoint = open_checkpoint(directory)
    for tokens in (*(past or ()), *(prompt or ())):
        if tokens >= checkpoint.max_length:
            raise WorkbookError(f"{directory} has {checkpoint.max_length} positions: {tokens} tokens leave no room.")
    for file in filter(None, (output, trace)):
        check_writable(file)
    command = "glmtrt " + shlex.join(sys.argv[1:])

    def keep(report: results.Report) -> None:
        if output:
            results.save(output, checkpoint, report, command)
        if trace:
            results.save_traces(trace, report, command)

    sizes = (past or (), prompt or (), batch or ())
    report = speed.measure(
        checkpoint,
        dtype,
        speed.default_sizes(checkpoint, *(sizes if any(sizes) else ())),
        only=engine or (),
        samples=samples,
        traced=speed.TRACED if trace else (),
        progress=say,
        keep=keep,
    )
    columns = ["engine", "phase", "batch", "tokens", "ms", "tokens per second", "of the limit"]
    rows = [
        (r.engine, r.phase, r.batch, r.past, r.median_ms, r.tokens_per_s, f"{r.floor_fraction:.2f}")
        for r in report.rows
    ]
    print_table(columns, rows, f"{report.copy_bandwidth_gb_s:.0f} GB/s, {report.matrix_tflop_s:.2f} TFLOP/s")
    for what, why in report.missing.items():
        tell(f"not measured: {what}: {why}")
    keep(report)


@app.command()
def memory(
    directory: Directory,
    output: Annotated[Path | None, typer.Option(help="save the measurement as JSON")] = None,
    phase: Annotated[list[Phase] | None, typer.Option(help="only this one; repeatable")] = None,
) -> None:
    """Measure memory, seconds and disk of each step.

    Each step runs in a process of its own.
    """
    from glmtrt_helpers.bench import memory
    from glmtrt_helpers.core.display import print_table
    from glmtrt_helpers.core.files import check_writable

    if output:
        check_writable(output)
    rows = memory.measure_memory(directory, phase or tuple(Phase), say)
    columns = ["phase", "seconds", "peak anonymous, GB", "peak file-backed, GB", "added on disk, MB"]
    sizes = [(row.peak_anonymous / 1e9, row.peak_mapped / 1e9, row.added / 1e6) for row in rows]
    print_table(columns, [(row.phase, row.seconds, *size) for row, size in zip(rows, sizes, strict=True)])
    if output:
        memory.save_memory(output, directory, rows)


@app.command()
def startup() -> None:
    """Measure the CPU time of `glmtrt --help`, best of five."""
    from glmtrt_helpers.bench.startup import cpu_seconds

    print(f"{min(cpu_seconds() for _ in range(5)):.2f} s of CPU time")
