"""The file of notebook 08's exercise: one constant of one layer's GELU is wrong, and the tool names that module."""

from pathlib import Path

import pytest

from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.graphs.locate import locate
from glmtrt_helpers.graphs.scopes import GraphIndex
from glmtrt_helpers.workbook.faults import sixth_fault


def test_one_constant_differs_and_its_module_is_found(exported_standin: Path) -> None:
    checkpoint = open_checkpoint(exported_standin)
    path = sixth_fault(checkpoint)
    try:
        fault, index = locate(checkpoint, "fp16", path).fault, GraphIndex(load_graph(path))
    finally:
        path.unlink()
    assert fault is not None and fault.module == "transformer.layers.2.mlp"
    constants = []
    for layer in (1, 2):
        nodes = [index.nodes[i] for i in sorted(index.inside(f"transformer.layers.{layer}.mlp"))]
        constants.append([index.scalar(name) for node in nodes for name in node.input])
    differing = [pair for pair in zip(*constants, strict=True) if pair[0] != pair[1]]
    assert [round(number, 3) for number in differing[0]] == [0.798, 0.5] and len(differing) == 1


def test_without_an_export_it_is_told(tiny_run: Path) -> None:
    with pytest.raises(WorkbookError):
        sixth_fault(open_checkpoint(tiny_run))
