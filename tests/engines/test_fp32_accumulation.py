"""Matmuls and LayerNorms of an fp16 engine accumulate in fp32: in the network, and in the built plan."""

from pathlib import Path
from typing import Any

import pytest
from support.exporting import exported_copy

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.engines import fp32_accumulation
from glmtrt_helpers.engines.builder import BuildOptions, build_engine
from glmtrt_helpers.export import exporting
from glmtrt_helpers.graphs.tensorrt_parser import parse


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return exported_copy(tmp_path_factory.mktemp("fp32_accumulation"))


def parsed(path: Path) -> tuple[Any, ...]:
    """The module, the parsed network, and the objects that must outlive it."""
    trt = tensorrt_package.choose(building=True).module
    builder, network, parser, errors = parse(trt, trt.Logger(trt.Logger.ERROR), path)
    assert not errors
    return trt, network, parser, builder


def outputs(network: Any) -> list[tuple[str, Any, tuple[int, ...]]]:
    tensors = [network.get_output(index) for index in range(network.num_outputs)]
    return [(tensor.name, tensor.dtype, tuple(tensor.shape)) for tensor in tensors]


def test_matmuls_and_layernorms_are_in_fp32_and_nothing_else(checkpoint: Checkpoint) -> None:
    path = exporting.onnx_path(checkpoint, "fp16")
    trt, network, *alive = parsed(path)
    before = outputs(network)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    selected = [one for one in layers if one.type in (trt.LayerType.MATRIX_MULTIPLY, trt.LayerType.NORMALIZATION)]
    others = {one.name: one.get_output(0).dtype for one in layers if one not in selected}
    nodes = [node.op_type for node in load_graph(path).graph.node]
    expected = sum(nodes.count(kind) for kind in ("MatMul", "Gemm", "LayerNormalization"))
    assert fp32_accumulation.accumulate_in_fp32(trt, network) == expected == len(selected)
    assert outputs(network) == before
    for layer in selected:
        tensors = [layer.get_input(index) for index in range(layer.num_inputs)] + [layer.get_output(0)]
        assert {tensor.dtype for tensor in tensors} == {trt.float32}, layer.name
    assert {one.name: one.get_output(0).dtype for one in layers if one not in selected} == others
    del alive


def test_a_graph_in_fp32_is_left_alone(checkpoint: Checkpoint) -> None:
    trt, network, *alive = parsed(exporting.onnx_path(checkpoint, "fp32"))
    count = network.num_layers
    assert fp32_accumulation.accumulate_in_fp32(trt, network) == 0 and network.num_layers == count
    del alive


def test_the_builder_recognizes_the_pattern(checkpoint: Checkpoint) -> None:
    """Every matmul accumulates in fp32 unless told otherwise, and no weight is stored in fp32."""
    exact = build_engine(checkpoint, "fp16")
    assert set(fp32_accumulation.accumulation_types(exact.plan)) == {"fp32"} and "fp16-sums" not in exact.info.options
    loose = build_engine(checkpoint, "fp16", options=BuildOptions(fp16_sums=True))
    assert set(fp32_accumulation.accumulation_types(loose.plan)) == {"TensorRT's default"}
    assert "fp16-sums" in loose.info.options
    assert exact.info.plan_bytes < 1.05 * loose.info.plan_bytes
