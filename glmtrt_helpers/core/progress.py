"""Progress on standard error: bars on a terminal, a line for each phase in a log or where `usage` watches."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console


def say(phase: str) -> None:
    """One line that names what begins now; it passes by whatever holds back the noise of exporters."""
    print(f"{phase} ...", file=sys.__stderr__, flush=True)


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
    """One bar for each phase that TensorRT reports, while it lasts; a line for each where nobody sees bars."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    # rich itself takes any output under Jupyter for a terminal, by FORCE_COLOR, which a notebook's children inherit.
    console = Console(stderr=True, force_terminal=None if sys.stderr.isatty() else False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def progress(phase: str, done: int, total: int) -> None:
            if phase not in tasks:  # on no terminal, phases within another one need no line
                if not console.is_terminal and all(task.finished for task in bars.tasks):
                    say(phase)
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total, visible=done < total)

        yield progress
