"""The working copy that notebooks read, made without running the notebooks before them."""

import subprocess

from support.checkpoints import ROOT

from glmtrt_helpers.checkpoints.working_copy import MARKER
from glmtrt_helpers.core.processes import GLMTRT

SOURCE, COPY = "models/chatglm_tiny", "models/run/chatglm_tiny"
# Number of a notebook, a file that it leaves in the working copy, and the command that makes the same.
STEPS = [
    ("00", MARKER, ["copy", SOURCE]),
    ("01", "inputs.json", ["inputs", COPY]),
    ("02", "modeling_chatglm.py.orig", ["patch", COPY]),
    ("03", "model.fp16.onnx", ["export", COPY]),
    ("03", "model.fp32.onnx", ["export", COPY, "--dtype", "fp32"]),
    ("05", "model.fp16.plan", ["build", COPY]),
]


def prepare_working_copy(notebook: str) -> None:
    """Make what the notebooks before this one leave in the working copy, as far as it is missing."""
    for number, file, command in STEPS:
        if number < notebook[:2] and not (ROOT / COPY / file).exists():
            subprocess.run([*GLMTRT, *command], cwd=ROOT, check=True, capture_output=True)
