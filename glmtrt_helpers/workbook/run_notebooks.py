"""TODO."""

import os
import sys
from pathlib import Path
from typing import Any

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.core import processes, tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.files import replacing
from glmtrt_helpers.workbook.setup import MODEL_VARIABLE, ROOT

SAVED = "Saved result, of the small checkpoint: without a GPU this one would take minutes for each answer.\n"


def notebooks() -> list[Path]:
    """The numbered notebooks, in order."""
    return sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def too_slow_to_talk(checkpoint: Checkpoint) -> bool:
    """Whether text takes minutes here, so that cells tagged `generates` show what they gave on the small checkpoint."""
    return checkpoint.is_large and not tensorrt_package.gpus()


def execute(notebook: Path, output: Path, timeout: int = 1200, *, talk: bool = True) -> None:
    """Run one notebook from a clean kernel and write the executed copy; an error output is raised as WorkbookError.

    talk: without it, cells tagged `generates` are not run; they keep their committed outputs, marked as such.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    class Client(NotebookClient):
        async def async_execute_cell(self, cell: Any, *args: Any, **options: Any) -> Any:
            if talk or "generates" not in cell.metadata.get("tags", []):
                return await super().async_execute_cell(cell, *args, **options)
            cell.outputs.insert(0, nbformat.v4.new_output("stream", name="stdout", text=SAVED))
            return cell

    content = nbformat.read(notebook, as_version=4)
    client = Client(
        content,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(notebook.parent)}},
        extra_arguments=["--log-level=ERROR"],  # the kernel warns about its transport
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        client.execute(env={**processes.huge_page_environment(), "PYTHONHASHSEED": "0"})
    except CellExecutionError as error:
        raise WorkbookError(f"{notebook.name} failed: {error.ename}: {error.evalue}; see {output}.") from error
    finally:
        with replacing(output) as temporary:
            nbformat.write(content, temporary)


def run_all(model: str, output: Path) -> None:
    """Execute every notebook on `model`, with progress, into `output`."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    os.environ[MODEL_VARIABLE] = model
    checkpoint = open_checkpoint(ROOT / model)
    talk = not too_slow_to_talk(checkpoint)
    if checkpoint.is_random:
        print(f"{model} holds random weights: for measuring, what it says means nothing.")
    if not talk:
        print("Cells that generate text show saved results, each marked: without a GPU an answer would take minutes.")
    paths = notebooks()
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as progress:
        for number, path in enumerate(paths, 1):
            task = progress.add_task(f"{number}/{len(paths)} {path.stem}", total=1)
            execute(path, output / path.name, talk=talk)
            progress.update(task, advance=1)
            if not sys.stdout.isatty():
                print(f"{number}/{len(paths)} {path.stem} done", flush=True)
