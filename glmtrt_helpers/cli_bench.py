"""The commands of `glmtrt bench`."""

from pathlib import Path
from typing import Annotated

import typer

from glmtrt_helpers.progress import say

app = typer.Typer(no_args_is_help=True, help="Measure, on this machine.")


@app.command()
def memory(
    directory: Annotated[Path, typer.Argument(help="a working copy, models/run/NAME")],
    output: Annotated[Path | None, typer.Option(help="keep the measurement as JSON")] = None,
    phase: Annotated[list[str] | None, typer.Option(help="only these: inputs, patch, export, build, verify")] = None,
) -> None:
    """Memory, seconds and disk of each step on a working copy, each in a process of its own; outputs are made anew."""
    from glmtrt_helpers import bench as benchmarks
    from glmtrt_helpers.pictures import print_table

    rows = benchmarks.memory(directory, phase or benchmarks.PHASES, say)
    columns = ["phase", "seconds", "peak anonymous, GB", "peak file-backed, GB", "added on disk, MB"]
    figures = [(r.phase, round(r.seconds, 1), *(round(n / 1e9, 2) for n in (r.peak_anonymous, r.peak_mapped)),
                round(r.added / 1e6, 1)) for r in rows]  # fmt: skip
    print_table(columns, figures)
    if output:
        benchmarks.save_memory(output, directory, rows)
