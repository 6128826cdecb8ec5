"""The shipped, trained checkpoint with its engines, for tests that need a GPU."""

import pytest
from support.checkpoints import TINY

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.working_copy import make_working_copy
from glmtrt_helpers.engines.builder import build_engine
from glmtrt_helpers.engines.profiles import Range, chat_profiles
from glmtrt_helpers.export import exporting
from glmtrt_helpers.patches import patching


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A working copy, patched, exported and built in both precisions, for up to four rows."""
    directory = make_working_copy(TINY, tmp_path_factory.mktemp("gpu"))
    patching.patch_checkpoint(directory)
    checkpoint = open_checkpoint(directory)
    for dtype in ("fp16", "fp32"):
        exporting.export_model(checkpoint, dtype)
        build_engine(checkpoint, dtype, chat_profiles(checkpoint, Range(1, 1, 4)))
    return checkpoint
