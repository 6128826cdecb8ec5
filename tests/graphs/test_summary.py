"""What the summary says of a graph is what the checkpoint holds, read without reading a weight."""

import os
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import parser
from rich.console import Console
from support.exporting import editing, path_of, replace_weight

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.graphs.attention_diagram import draw_layer
from glmtrt_helpers.graphs.checks import problems
from glmtrt_helpers.graphs.summary import TensorInfo, summarize
from glmtrt_helpers.inputs.names import input_names, output_names


@pytest.mark.parametrize(("dtype", "numpy_name"), [("fp16", "float16"), ("fp32", "float32")])
def test_summary_counts_what_the_checkpoint_holds(checkpoint: Checkpoint, dtype: str, numpy_name: str) -> None:
    summary = summarize(path_of(checkpoint, dtype))
    stored = [tensor for name, tensor in checkpoint.tensors.items() if "inv_freq" not in name]
    # The shards hold fp16, whatever the graph computes in.
    assert summary.weight_bytes == sum(tensor.nbytes for tensor in stored) == 2 * summary.parameters
    assert summary.file_bytes == path_of(checkpoint, dtype).stat().st_size < summary.weight_bytes
    assert summary.opset == 18 and "glmtrt" in summary.producer
    model = load_graph(path_of(checkpoint, dtype))
    assert sum(summary.nodes.values()) == len(model.graph.node)
    assert summary.nodes["Softmax"] == 2 and list(summary.nodes.values()) == sorted(summary.nodes.values())[::-1]
    assert [tensor.name for tensor in summary.inputs] == input_names(2)
    assert [tensor.name for tensor in summary.outputs] == output_names(2)
    shapes = {tensor.name: (tensor.dtype, tensor.dims) for tensor in summary.inputs + summary.outputs}
    assert shapes["position_ids"] == ("int64", ("batch", 2, "sequence"))
    assert shapes["attention_mask"] == ("bool", ("batch", 1, "sequence", "total"))
    assert shapes["past_key_values.1.value"] == (numpy_name, ("past", "batch", 4, 16))
    assert shapes["present.1.value"] == (numpy_name, ("total", "batch", 4, 16))
    assert shapes["logits"] == (numpy_name, ("batch", "sequence", checkpoint.vocab_size))


def test_weights_inside_the_file_are_counted_under_any_name(tmp_path: Path) -> None:
    """As another exporter leaves them: transposed under a new name, in a Constant, read twice, after a Transpose."""
    text = """<ir_version: 8, opset_import: ["" : 18]> g (float[batch, 4] x) => (float[batch, 4] output)
        <float[4, 2] val_1 = {1, 2, 3, 4, 5, 6, 7, 8}, float[3] table = {1, 2, 3}, float[1] half = {0.5}> {
            halved = Mul (x, half)
            narrow = MatMul (halved, val_1)
            square = Constant <value = float[2, 2] {1, 2, 3, 4}> ()
            turned = MatMul (narrow, square)
            again = MatMul (turned, square)
            wide = Transpose <perm = [1, 0]> (val_1)
            output = MatMul (again, wide) }"""
    onnx.save(parser.parse_model(text), tmp_path / "model.onnx")
    assert summarize(tmp_path / "model.onnx").parameters == 8 + 4


def test_summary_prints_every_figure(checkpoint: Checkpoint) -> None:
    summary = summarize(path_of(checkpoint))
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(summary)
    text = console.export_text()
    for figure in (summary.parameters, summary.weight_bytes, summary.file_bytes):
        assert f"{figure:,}" in text
    assert "present.1.value float16 (total, batch, 4, 16)" in text
    assert f"Mul {summary.nodes['Mul']}" in text and "Softmax" not in text  # the rare ones are left out
    # Of the tensors of 28 layers the first and the last are shown.
    names = [f"past_key_values.{i}.key" for i in range(56)]
    many = [TensorInfo(name, "float16", ("past", "batch")) for name in names]
    console.print(replace(summary, inputs=many))
    text = console.export_text()
    assert "56 inputs" in text and names[0] in text and names[-1] in text and names[20] not in text


def test_no_weight_is_read(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Summary, problems and drawing come from the graph and the sizes of the shards alone."""
    before = summarize(path_of(checkpoint))

    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(onnx.external_data_helper, "load_external_data_for_tensor", refuse)
    assert summarize(path_of(checkpoint)) == before
    assert problems(path_of(checkpoint), checkpoint) == []
    assert draw_layer(path_of(checkpoint), 0)


@pytest.mark.parametrize("look", [summarize, problems])
def test_weights_that_are_not_there_are_named(checkpoint: Checkpoint, look: object) -> None:
    assert callable(look)
    shard = checkpoint.tensors["lm_head.weight"].file
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    sizes = rf"\({len(content) - 1:,} bytes instead of {len(content):,}\)"
    with pytest.raises(WorkbookError, match=rf"{shard.name} is not the file .* {sizes}: .*`glmtrt export"):
        look(path_of(checkpoint))
    shard.unlink()
    with pytest.raises(WorkbookError, match=f"{shard.name} is missing, and model.fp16.onnx was made from it"):
        look(path_of(checkpoint))


@pytest.mark.parametrize("look", [summarize, problems])
def test_missing_file_names_what_makes_it(tmp_path: Path, look: object) -> None:
    assert callable(look)
    with pytest.raises(WorkbookError, match="is missing: give the path of an ONNX file, or of a working copy"):
        look(tmp_path / "model.fp16.onnx")
    (tmp_path / "config.json").touch()
    with pytest.raises(WorkbookError, match="make a working copy with `glmtrt copy"):
        look(tmp_path / "model.fp16.onnx")


def test_a_weight_inside_the_file_still_counts_as_a_parameter(checkpoint: Checkpoint) -> None:
    before = summarize(path_of(checkpoint))
    with editing(path_of(checkpoint)) as model:
        replace_weight("lm_head.weight")(model)
    after = summarize(path_of(checkpoint))
    assert after.parameters == before.parameters
    assert before.weight_bytes - after.weight_bytes == checkpoint.tensors["lm_head.weight"].nbytes


def test_weights_among_the_inputs_are_no_inputs(checkpoint: Checkpoint) -> None:
    """Files of IR version 3 and older list their initializers there."""
    with editing(path_of(checkpoint)) as model:
        model.graph.input.append(
            onnx.helper.make_tensor_value_info("lm_head.weight", onnx.TensorProto.FLOAT16, [480, 64])
        )
    assert [tensor.name for tensor in summarize(path_of(checkpoint)).inputs] == input_names(2)
    assert problems(path_of(checkpoint), checkpoint) == []
