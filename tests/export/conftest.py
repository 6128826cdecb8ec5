"""One exported checkpoint that the tests of this folder share."""

import pytest
from support.exporting import exported_copy

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """model.fp16.onnx and model.fp32.onnx beside the shards; tests may export again but change nothing else."""
    return exported_copy(tmp_path_factory.mktemp("exported"))
