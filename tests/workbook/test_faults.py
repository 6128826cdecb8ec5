"""The file of notebook 08's exercise: one constant is wrong, and the tool names the node that reads it."""

from pathlib import Path

import numpy as np
import pytest

from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.graphs.locate import locate
from glmtrt_helpers.graphs.scopes import GraphIndex
from glmtrt_helpers.workbook.faults import sixth_fault


def test_it_is_found_in_the_mlp_of_the_layer(exported_standin: Path) -> None:
    checkpoint = open_checkpoint(exported_standin)
    path = sixth_fault(checkpoint)
    found = locate(checkpoint, "fp16", path)
    assert found.fault is not None and found.fault.module.startswith("transformer.layers.2.mlp")
    index = GraphIndex(load_graph(path))
    read = [index.scalar(name) for name in found.fault.node.input]
    assert any(value is not None and np.isclose(value, 0.5) for value in read)


def test_without_an_export_it_is_told(tiny_run: Path) -> None:
    with pytest.raises(WorkbookError):
        sixth_fault(open_checkpoint(tiny_run))
