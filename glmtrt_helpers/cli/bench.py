"""The commands of `glmtrt bench`: `glmtrt bench DIR` measures speed, `glmtrt bench memory DIR` memory."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from glmtrt_helpers.core.progress import say


class _SpeedByDefault(TyperGroup):
    """A first word that names no command is the folder that `speed` measures."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["speed", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_SpeedByDefault, no_args_is_help=True, help="Measure, on this machine.")
Directory = Annotated[Path, typer.Argument(help="a working copy, models/run/NAME")]


@app.command()
def speed(
    directory: Directory,
    dtype: Annotated[str, typer.Option(help="fp16 or fp32")] = "fp16",
    output: Annotated[Path | None, typer.Option(help="keep the measurement as JSON")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="only these; all that run here by default")] = None,
    past: Annotated[list[int] | None, typer.Option(help="tokens in the cache of a decode")] = None,
    prompt: Annotated[list[int] | None, typer.Option(help="tokens of a prefill")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="rows of a decode at past 512")] = None,
    samples: Annotated[int, typer.Option(help="of each measurement")] = 30,
    batches: Annotated[Path | None, typer.Option(help="a working copy whose engines take several rows")] = None,
    trace: Annotated[Path | None, typer.Option(help="record the engines' kernels, too, and keep them as JSON")] = None,
) -> None:
    """Milliseconds of prefill and decode in everything that runs here, beside what the hardware allows at best."""
    from glmtrt_helpers.bench import results, speed
    from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
    from glmtrt_helpers.core.display import print_table

    checkpoint = open_checkpoint(directory)
    given = (past is not None, prompt is not None, batch is not None)
    chosen = (past or (), prompt or (), batch or ()) if any(given) else ()
    report = speed.measure(
        checkpoint, dtype, speed.sizes(checkpoint, *chosen), only=engine or (), samples=samples,
        rows_of=open_checkpoint(batches) if batches else None,
        traced=speed.TRACED if trace else (), progress=say,
    )  # fmt: skip
    columns = ["engine", "phase", "batch", "tokens", "ms", "tokens a second", "of the floor"]
    rows = [
        (r.engine, r.phase, r.batch, r.past, r.median_ms, r.tokens_per_s, f"{r.floor_fraction:.2f}")
        for r in report.rows
    ]
    print_table(columns, rows, f"{report.copy_bandwidth_gb_s:.0f} GB/s, {report.matrix_tflop_s:.2f} TFLOP/s")
    for what, why in report.missing.items():
        print(f"not measured: {what}: {why}", file=sys.stderr)
    command = "glmtrt " + shlex.join(sys.argv[1:])
    if output:
        results.save(output, checkpoint, report, command)
    if trace:
        results.save_traces(trace, report, command)


@app.command()
def memory(
    directory: Directory,
    output: Annotated[Path | None, typer.Option(help="keep the measurement as JSON")] = None,
    phase: Annotated[list[str] | None, typer.Option(help="only these: inputs, patch, export, build, verify")] = None,
) -> None:
    """Memory, seconds and disk of each step on a working copy, each in a process of its own; outputs are made anew."""
    from glmtrt_helpers.bench import memory
    from glmtrt_helpers.core.display import print_table

    rows = memory.measure_memory(directory, phase or memory.PHASES, say)
    columns = ["phase", "seconds", "peak anonymous, GB", "peak file-backed, GB", "added on disk, MB"]
    figures = [(r.phase, round(r.seconds, 1), *(round(n / 1e9, 2) for n in (r.peak_anonymous, r.peak_mapped)),
                round(r.added / 1e6, 1)) for r in rows]  # fmt: skip
    print_table(columns, figures)
    if output:
        memory.save_memory(output, directory, rows)
