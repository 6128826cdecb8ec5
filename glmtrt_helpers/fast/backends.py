"""What `chat.backends` does, for the fast engine: its session by backend, and which backend can run here."""

from __future__ import annotations

from glmtrt_helpers.chat import backends
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.fast.session import PARTS, FastOrtSession, FastSession, part_path


def open_session(checkpoint: Checkpoint, backend: str, dtype: str = "fp16") -> FastSession:
    """The session of a backend over the fast graphs of the working copy, or over their engines."""
    if backend == "tensorrt":
        from glmtrt_helpers.fast.tensorrt import FastTensorRTSession  # cuda-python

        return FastTensorRTSession.open(checkpoint, dtype)
    if backend != "ort":
        raise WorkbookError(f"the fast decoder does not run on {backend}: leave --fast out, or take tensorrt or ort.")
    return FastOrtSession(checkpoint, dtype)


def unavailable(checkpoint: Checkpoint, dtype: str = "fp16") -> dict[str, str]:
    """For every backend that cannot be opened here, why; without opening any."""
    models = [part_path(checkpoint, dtype, part).with_suffix("") for part in PARTS]
    reasons = backends.unavailable_files(checkpoint, models)
    return reasons | {"torch": "the fast decoder is an exported graph."}


def best_backend(checkpoint: Checkpoint, dtype: str = "fp16") -> tuple[str, str]:
    """The fastest backend that can be opened here, and why no faster one."""
    return backends.first_available(checkpoint, unavailable(checkpoint, dtype))
