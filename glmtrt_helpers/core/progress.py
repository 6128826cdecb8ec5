"""Progress on standard error: bars on a terminal, a line per phase in a log and where `processes.measure` reads."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from glmtrt_helpers.core.text import tell


def say(phase: str) -> None:
    """Print the phase that begins now, also where the standard error of an exporter is being suppressed."""
    tell(f"{phase} ...", sys.__stderr__)


@contextlib.contextmanager
def bytes_bar(title: str) -> Iterator[Any]:
    """A bar of bytes done and to do, on standard error."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(title), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def phase_bars() -> Iterator[Any]:
    """A bar for each phase that TensorRT reports, while it lasts; a line for each where there is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    # Under Jupyter FORCE_COLOR is set, by which rich takes any output for a terminal, in child processes too.
    console = Console(stderr=True, force_terminal=None if sys.stderr.isatty() else False)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def progress(phase: str, done: int, total: int) -> None:
            if phase not in tasks:  # without a terminal, a phase within another one gets no line
                if not console.is_terminal and all(task.finished for task in bars.tasks):
                    say(phase)
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total, visible=done < total)

        yield progress
