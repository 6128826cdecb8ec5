"""What the notebooks share: opening the working copy, scratch copies for failing lessons, and staged failures."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.working_copy import is_working_copy, make_working_copy, working_copy_path
from glmtrt_helpers.core import display
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.text import shorten, tell
from glmtrt_helpers.engines.builder import build_engine
from glmtrt_helpers.export import exporting
from glmtrt_helpers.patches import patching
from glmtrt_helpers.standin import random_weights

ROOT = Path(__file__).resolve().parent.parent.parent
DEFAULT_MODEL = "models/chatglm_tiny"
# Set by `make workbook MODEL=...`: a path relative to the project's folder, or an absolute one.
MODEL_VARIABLE = "GLMTRT_MODEL"
# Ten that the stand-in learned; notebooks 06 and 07 ask them to every backend.
QUESTIONS = (
    "你好",
    "What is a profile?",
    "谢谢",
    "Hello",
    "你是谁？",
    "Who are you?",
    "为什么要用 flatten？",
    "Thank you",
    "What is a hook?",
    "什么是 plan 文件？",
)


def start(*, create: bool = False) -> Checkpoint:
    """Open the working copy of the selected checkpoint; every notebook begins with this.

    The current directory becomes the project's folder, so that paths are the same in a notebook and in a shell.
    create: make or refresh the working copy (notebook 00). Without it, a missing copy raises WorkbookError.
    """
    os.chdir(ROOT)
    display.use_workbook_style()
    source = Path(os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL)
    if create:
        return open_checkpoint(make_working_copy(source))
    copy = working_copy_path(source)
    if not is_working_copy(copy):
        raise WorkbookError(
            f"{copy} is missing or no working copy: run notebook 00_start_here or `glmtrt copy {source}` first."
        )
    return open_checkpoint(copy)


def scratch_copy(label: str) -> Path:
    """A fresh, unpatched copy of the shipped checkpoint under build/scratch/, for cells that break something."""
    copy = Path("build/scratch") / label
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(DEFAULT_MODEL, copy)
    return copy


def scratch_engine(label: str) -> Checkpoint:
    """A fresh copy of the shipped checkpoint, patched, exported and built, for cells that break one of these."""
    directory = scratch_copy(label)
    patching.patch_checkpoint(directory)
    checkpoint = open_checkpoint(directory)
    exporting.export_model(checkpoint, "fp16")
    build_engine(checkpoint, "fp16")
    return checkpoint


def middle_checkpoint() -> Checkpoint:
    """A patched checkpoint of 283 MB of random weights: large enough for them to show in a process's memory."""
    directory = Path("build/scratch/chatglm_300m")
    if not (directory / "model.safetensors.index.json").exists():  # written last
        random_weights.write_random(directory, "300m")
    patching.patch_checkpoint(directory)
    return open_checkpoint(directory)


def scratch_file(name: str) -> Path:
    """A path under build/scratch/ for a temporary result."""
    path = Path("build/scratch") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def reference_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of PyTorch on a CPU: fp32, or memory-mapped fp16 where fp32 would not fit in a laptop."""
    return torch.float32 if checkpoint.weight_bytes < 2e9 else torch.float16


@contextlib.contextmanager
def expect(
    error: type[BaseException] | tuple[type[BaseException], ...], says: str = "", lines: int = 3
) -> Iterator[None]:
    """Require that the block raises `error` with `says` in its text, and print up to `lines` lines from there on.

    A block that does not fail, or fails otherwise, is itself an error: the notebook would claim something untrue.
    """
    try:
        yield
    except error as caught:
        text = str(caught).strip()
        if says not in text:
            raise
        message = [line.strip() for line in text.splitlines() if line.strip()]
        first = next((i for i, line in enumerate(message) if says in line), 0)
        shown = "\n  ".join(shorten(line, 300) for line in message[first : first + lines])
        tell(f"{type(caught).__name__}: {shown}", sys.stdout)
    else:
        raise AssertionError(f"this cell was to fail with {error} and did not")
