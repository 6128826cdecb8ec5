"""Execute the notebooks, each in a clean kernel: all in order for `glmtrt workbook`, or one for its test."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbclient.output_widget import OutputWidget
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.code_hash import announce
from glmtrt_helpers.core import processes, tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.files import check_writable, replacing
from glmtrt_helpers.core.text import tell
from glmtrt_helpers.workbook.setup import MODEL_VARIABLE, ROOT

GENERATES = "generates"  # tag of cells that generate text
WIDGET = "application/vnd.jupyter.widget-view+json"
# In place of what only a running kernel can show; its picture is in the notebook, too.
STATIC = "(Shown here where a kernel is running: the notebook in JupyterLab.)"
SAVED = "Saved result, of the small checkpoint: without a GPU this one would take minutes for each answer.\n"


class _SilentOutput(OutputWidget):
    """Does not send the outputs of an output widget back to the kernel, where nothing reads them.

    nbclient sends them on the socket on which it waits for the reply to the cell. Sending can swallow the signal that
    the reply is there, and then nbclient waits for ever (jupyter/nbclient#312).
    """

    def send(self, *_: object, **__: object) -> None:
        return


def notebooks() -> list[Path]:
    """The numbered notebooks, in order."""
    return sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def generates_too_slowly(checkpoint: Checkpoint) -> bool:
    """Whether an answer takes minutes here, so that cells tagged `generates` show their committed outputs."""
    return checkpoint.is_large and not tensorrt_package.gpus()


def execute(notebook: Path, output: Path, timeout: int = 1200, *, generate: bool = True) -> None:
    """Run one notebook in a clean kernel and write the executed copy, without what only a kernel can show.

    Raises WorkbookError when a cell fails; what was executed until then is written to `NAME.failed.ipynb` beside it.

    timeout: seconds for each cell. generate: whether cells tagged `generates` run; otherwise they keep their committed
    outputs, under a note that says so.
    """
    content = nbformat.read(notebook, as_version=4)
    client = NotebookClient(
        content,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(notebook.parent)}},
        extra_arguments=["--log-level=ERROR"],  # the kernel warns about its transport
        coalesce_streams=True,  # a cell's output arrives in pieces, differently each time
        skip_cells_with_tag="" if generate else GENERATES,
    )
    client.widget_registry["@jupyter-widgets/output"]["OutputModel"] = _SilentOutput
    if not generate:
        for cell in content.cells:
            if GENERATES in cell.metadata.get("tags", []):
                cell.outputs.insert(0, nbformat.v4.new_output("stream", name="stdout", text=SAVED))
    output.parent.mkdir(parents=True, exist_ok=True)
    check_writable(output)
    failed = output.with_suffix(".failed.ipynb")
    try:
        _execute(client)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        _write(content, failed)
        why = f"{error.ename}: {error.evalue}" if isinstance(error, CellExecutionError) else str(error).strip()
        raise WorkbookError(f"{notebook.name} failed: {why}; see {failed}.") from error
    _write(content, output)
    failed.unlink(missing_ok=True)


def _write(content: nbformat.NotebookNode, path: Path) -> None:
    for output in (output for cell in content.cells for output in cell.get("outputs", [])):
        data = output.get("data", {})
        if WIDGET in data or "<iframe" in data.get("text/html", ""):
            output.data = {"text/plain": STATIC}
    content.metadata.pop("widgets", None)
    with replacing(path) as temporary:
        nbformat.write(content, temporary)


def _execute(client: NotebookClient) -> None:
    """Run the cells. nbclient answers Ctrl-C and SIGTERM by ending the kernel, whose death is all that it tells."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        client.execute(
            env={**processes.huge_page_environment(), "PYTHONHASHSEED": "0"},
            stderr=subprocess.DEVNULL,  # of a kernel that is ended while it starts; what cells print comes another way
        )
    except (DeadKernelError, CellExecutionError):
        if hasattr(client, "_async_cleanup_kernel_future"):  # of a signal
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_all(model: str, output: Path, paths: Sequence[Path]) -> None:
    """Execute notebooks on `model`, with progress, into `output`."""
    os.environ[MODEL_VARIABLE] = model
    checkpoint = open_checkpoint(ROOT / model)
    generate = not generates_too_slowly(checkpoint)
    if checkpoint.is_random:
        tell(f"{model} holds random weights, for measuring: its answers mean nothing.", sys.stdout)
    if not generate:
        print("Cells that generate text show saved results, each marked: without a GPU an answer would take minutes.")
    announce(checkpoint.code)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as progress:
        for number, path in enumerate(paths, 1):
            task = progress.add_task(f"{number}/{len(paths)} {path.stem}", total=1)
            execute(path, output / path.name, generate=generate)
            progress.update(task, advance=1)
            if not sys.stdout.isatty():
                print(f"{number}/{len(paths)} {path.stem} done", flush=True)
