"""What the notebooks have in common: finding the working copy, and running them all in order."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.working_copy import make_working_copy
from glmtrt_helpers.core import display
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines.builder import build_engine
from glmtrt_helpers.export import exporting
from glmtrt_helpers.patches import patching
from glmtrt_helpers.standin import random_weights

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_MODEL = "models/chatglm_tiny"
# Set by `make workbook MODEL=...`; a path from the project's folder, or an absolute one.
MODEL_VARIABLE = "GLMTRT_MODEL"


def start(*, create: bool = False) -> Checkpoint:
    """Open the working copy of the chosen checkpoint; every notebook begins with this.

    The current directory becomes the project's folder, so that paths read the same in a notebook and in a shell.
    create: make or refresh the working copy (notebook 00). Without it, a missing copy is an error naming notebook 00.
    """
    os.chdir(ROOT)
    display.use_workbook_style()
    source = Path(os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL)
    if create:
        return open_checkpoint(make_working_copy(source))
    copy = source if source.parent.name == "run" else source.parent / "run" / source.name
    if not copy.is_dir():
        raise WorkbookError(f"{copy} is missing: run notebook 00_start_here or `glmtrt copy {source}` first.")
    return open_checkpoint(copy)


def scratch_copy(label: str) -> Path:
    """A fresh, unpatched copy of the shipped checkpoint under build/scratch/, for lessons that break something."""
    copy = Path("build/scratch") / label
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(DEFAULT_MODEL, copy)
    return copy


def scratch_engine(label: str) -> Checkpoint:
    """The shipped checkpoint, patched, exported and built in a fresh copy, for lessons that break one of these."""
    directory = scratch_copy(label)
    patching.patch_checkpoint(directory)
    checkpoint = open_checkpoint(directory)
    exporting.export_model(checkpoint, "fp16")
    build_engine(checkpoint, "fp16")
    return checkpoint


def middle_checkpoint() -> Checkpoint:
    """Random weights of 283 MB, patched: large enough to see in a process's memory where the weights are."""
    directory = Path("build/scratch/chatglm_300m")
    if not (directory / "model.safetensors.index.json").exists():  # it is written last
        random_weights.write_random(directory, "300m")
    patching.patch_checkpoint(directory)
    return open_checkpoint(directory)


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
