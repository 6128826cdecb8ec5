"""What the notebooks have in common: finding the working copy, and running them all in order."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from glmtrt_helpers import checkpoints, engines, export, hugepages, packages, patches, pictures
from glmtrt_helpers.checkpoints import Checkpoint
from glmtrt_helpers.errors import WorkbookError
from glmtrt_helpers.files import replacing
from glmtrt_helpers.standin import sized

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_MODEL = "models/chatglm_tiny"
# Set by `make workbook MODEL=...`; a path from the project's folder, or an absolute one.
MODEL_VARIABLE = "GLMTRT_MODEL"
SAVED = "Saved result, of the small checkpoint: without a GPU this one would take minutes for each answer.\n"


def start(*, create: bool = False) -> Checkpoint:
    """Open the working copy of the chosen checkpoint; every notebook begins with this.

    The current directory becomes the project's folder, so that paths read the same in a notebook and in a shell.
    create: make or refresh the working copy (notebook 00). Without it, a missing copy is an error naming notebook 00.
    """
    os.chdir(ROOT)
    pictures.use_workbook_style()
    source = Path(os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL)
    if create:
        return checkpoints.open_checkpoint(checkpoints.working_copy(source))
    copy = source if source.parent.name == "run" else source.parent / "run" / source.name
    if not copy.is_dir():
        raise WorkbookError(f"{copy} is missing: run notebook 00_start_here or `glmtrt copy {source}` first.")
    return checkpoints.open_checkpoint(copy)


def scratch_copy(label: str) -> Path:
    """A fresh, unpatched copy of the shipped checkpoint under build/scratch/, for lessons that break something."""
    copy = Path("build/scratch") / label
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(DEFAULT_MODEL, copy)
    return copy


def scratch_engine(label: str) -> Checkpoint:
    """The shipped checkpoint, patched, exported and built in a fresh copy, for lessons that break one of these."""
    directory = scratch_copy(label)
    patches.patch_checkpoint(directory)
    checkpoint = checkpoints.open_checkpoint(directory)
    export.export_model(checkpoint, "fp16")
    engines.build_engine(checkpoint, "fp16")
    return checkpoint


def middle_checkpoint() -> Checkpoint:
    """Random weights of 283 MB, patched: large enough to see in a process's memory where the weights are."""
    directory = Path("build/scratch/chatglm_300m")
    if not (directory / "model.safetensors.index.json").exists():  # it is written last
        sized.write_random(directory, "300m")
    patches.patch_checkpoint(directory)
    return checkpoints.open_checkpoint(directory)


def scratch_file(name: str) -> Path:
    """A path under build/scratch/ for something that is thrown away."""
    path = Path("build/scratch") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def reference_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What PyTorch runs in on a CPU: fp32, or fp16 with mapped weights where fp32 would not fit a laptop."""
    return torch.float32 if checkpoint.weight_bytes < 2e9 else torch.float16


@contextlib.contextmanager
def expect(
    error: type[BaseException] | tuple[type[BaseException], ...], says: str = "", lines: int = 3
) -> Iterator[None]:
    """Stage a failure: the block must raise `error` with `says` in its text; prints the end of what it said.

    A block that does not fail, or fails otherwise, is itself an error: the lesson it stages would be untrue.
    """
    try:
        yield
    except error as caught:
        text = str(caught).strip()
        if says not in text:
            raise
        said = [line.strip() for line in text.splitlines() if line.strip()]
        shown = next((i for i, line in enumerate(said) if says in line), 0)
        print(f"{type(caught).__name__}: " + "\n  ".join(line[:300] for line in said[shown : shown + lines]))
    else:
        raise AssertionError(f"this cell was to fail with {error} and did not")


def notebooks() -> list[Path]:
    """The numbered notebooks, in order."""
    return sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def too_slow_to_talk(checkpoint: Checkpoint) -> bool:
    """Whether text takes minutes here, so that cells tagged `generates` show what they gave on the small checkpoint."""
    return checkpoint.is_large and not packages.gpus()


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
        client.execute(env={**hugepages.environment(), "PYTHONHASHSEED": "0"})
    except CellExecutionError as error:
        raise WorkbookError(f"{notebook.name} failed: {error.ename}: {error.evalue}; see {output}.") from error
    finally:
        with replacing(output) as temporary:
            nbformat.write(content, temporary)


def run_all(model: str, output: Path) -> None:
    """Execute every notebook on `model`, with progress, into `output`."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    os.environ[MODEL_VARIABLE] = model
    checkpoint = checkpoints.open_checkpoint(ROOT / model)
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
