"""A private copy of an exported checkpoint, which a test may damage."""

from pathlib import Path

import pytest
from support.exporting import exported_copy

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return exported_copy(tmp_path)
