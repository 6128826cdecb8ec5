"""Inspection of graphs: the counts are the checkpoint's, and every fault that a graph can have is named."""

import logging
import urllib.request
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import parser
from rich.console import Console
from support.exporting import editing, exported_copy, replace_weight, shift_weight

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.graphs.attention_diagram import draw_layer, layer_nodes
from glmtrt_helpers.graphs.plots import netron_view
from glmtrt_helpers.graphs.summary import (
    StaticDimension,
    TensorInfo,
    dead_inputs,
    missing_inputs,
    problems,
    static_dimensions,
    summarize,
)
from glmtrt_helpers.inputs.names import input_names, output_names


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return exported_copy(tmp_path)


def path_of(checkpoint: Checkpoint, dtype: str = "fp16") -> Path:
    return checkpoint.directory / f"model.{dtype}.onnx"


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


def test_summary_prints_every_figure(checkpoint: Checkpoint) -> None:
    summary = summarize(path_of(checkpoint))
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
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
    with pytest.raises(WorkbookError, match=f"{shard.name} ends at byte {len(content) - 1:,}.*export again"):
        look(path_of(checkpoint))
    shard.unlink()
    with pytest.raises(WorkbookError, match=f"{shard.name} is missing, but model.fp16.onnx keeps"):
        look(path_of(checkpoint))


@pytest.mark.parametrize("look", [summarize, problems, netron_view])
def test_missing_file_names_what_makes_it(tmp_path: Path, look: object) -> None:
    assert callable(look)
    with pytest.raises(WorkbookError, match="run notebook 03_export_onnx or `glmtrt export"):
        look(tmp_path / "model.fp16.onnx")


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_good_export_has_no_problem(checkpoint: Checkpoint, dtype: str) -> None:
    assert problems(path_of(checkpoint, dtype), checkpoint) == []
    assert problems(path_of(checkpoint, dtype)) == []


@pytest.mark.parametrize(
    ("tensor", "axis", "meaning"),
    [
        ("input_ids", 1, "sequence"),
        ("position_ids", 0, "batch"),
        ("attention_mask", 3, "total"),
        ("past_key_values.1.key", 0, "past"),
        ("present.0.value", 0, "total"),
        ("logits", 1, "sequence"),
    ],
)
def test_a_pinned_dimension_is_found(checkpoint: Checkpoint, tensor: str, axis: int, meaning: str) -> None:
    with editing(path_of(checkpoint)) as model:
        value = next(v for v in [*model.graph.input, *model.graph.output] if v.name == tensor)
        value.type.tensor_type.shape.dim[axis].dim_value = 1
    pinned = static_dimensions(load_graph(path_of(checkpoint)))
    assert pinned == [StaticDimension(tensor, axis, meaning, 1)]
    (sentence,) = problems(path_of(checkpoint), checkpoint)
    assert f"axis {axis} of {tensor} ({meaning}) is pinned to 1" in sentence


def test_an_input_that_nothing_reads_is_dead(checkpoint: Checkpoint) -> None:
    """The branch on the mask's values, traced with nothing masked: declared, and no node reads it."""
    with editing(path_of(checkpoint)) as model:
        for node in model.graph.node:
            for i, name in enumerate(node.input):
                if name == "attention_mask":
                    node.input[i] = "nothing_is_hidden"
        nothing = onnx.helper.make_tensor("nothing_is_hidden", onnx.TensorProto.BOOL, [1, 1, 1, 1], [False])
        model.graph.initializer.append(nothing)
    assert dead_inputs(load_graph(path_of(checkpoint))) == ["attention_mask"]
    assert problems(path_of(checkpoint), checkpoint) == [
        "input attention_mask is declared, but its values reach no output."
    ]


def test_an_input_that_is_gone_is_missed(checkpoint: Checkpoint) -> None:
    with editing(path_of(checkpoint)) as model:
        model.graph.input.remove(next(value for value in model.graph.input if value.name == "attention_mask"))
        model.graph.output.remove(next(value for value in model.graph.output if value.name == "present.1.key"))
    assert missing_inputs(load_graph(path_of(checkpoint)), 2) == ["attention_mask"]
    first, second = problems(path_of(checkpoint), checkpoint)
    assert "attention_mask is missing (10 tensors instead of 12)" in first and "present.1.key is missing" in second


@pytest.mark.parametrize(
    ("body", "dead"),
    [
        ("y = Add (a, b)", []),
        ("y = Identity (a)", ["b"]),
        ("s = Shape (b) y = Expand (a, s)", ["b"]),
        ("unused = Neg (b) y = Identity (a)", ["b"]),
        ("y = If (c) <then_branch = t () => (float[n] p) {p = Neg (b)}, "
         "else_branch = e () => (float[n] q) {q = Neg (a)}>", []),
    ],
)  # fmt: skip
def test_dead_inputs_are_those_whose_values_reach_no_output(body: str, dead: list[str]) -> None:
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 18]> g (float[n] a, float[n] b, bool c) => (float[n] y) {{ {body} }}'
    )
    # c is there for the If; elsewhere nothing reads it.
    assert [name for name in dead_inputs(model) if name != "c"] == dead


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("h = Cast <to = 10> (x) r = Range (h, h, h) y = Cast <to = 1> (r)", "Range in half precision"),
        ("r = Range (x, x, x) y = Identity (r)", ""),
        ("y = Squeeze (x)", "Squeeze without axes"),
        ("o = Constant <value_ints = [0]> () y = Squeeze (x, o)", ""),
        ("s = Shape (x) z = Squeeze (s) y = Cast <to = 1> (z)", ""),
        ("q = SplitToSequence (x) i = Constant <value_int = 0> () y = SequenceAt (q, i)", "SequenceAt"),
    ],
)
def test_operators_that_tensorrt_refuses_are_named(tmp_path: Path, body: str, says: str) -> None:
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> g (float x) => (float y) {{ {body} }}')
    onnx.save(model, str(tmp_path / "model.onnx"))
    found = [problem for problem in problems(tmp_path / "model.onnx") if "refuse" in problem]
    assert bool(found) == bool(says) and says in " ".join(found)


def test_weights_of_another_place_or_name_are_problems(checkpoint: Checkpoint) -> None:
    name = "transformer.layers.1.mlp.dense_4h_to_h.weight"
    with editing(path_of(checkpoint)) as model:
        shift_weight(name, 2)(model)
    (sentence,) = problems(path_of(checkpoint), checkpoint)
    assert sentence.startswith("weights that are not the checkpoint's: 1, the first: ") and name in sentence
    with editing(path_of(checkpoint, "fp32")) as model:
        next(tensor for tensor in model.graph.initializer if tensor.name == "lm_head.weight").name = "folded"
    (sentence,) = problems(path_of(checkpoint, "fp32"), checkpoint)
    assert "lm_head.weight is no initializer of its own" in sentence
    # What is stored in a shard is a parameter under any name.
    assert summarize(path_of(checkpoint, "fp32")).parameters == summarize(path_of(checkpoint)).parameters
    smaller = replace(checkpoint, config={**checkpoint.config, "inner_hidden_size": 128})
    assert "has shape (256, 64) for (128, 64)" in problems(path_of(checkpoint, "fp32"), smaller)[0]


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


def test_layer_nodes_are_the_layers_own(checkpoint: Checkpoint) -> None:
    model = load_graph(path_of(checkpoint))
    attention = [layer_nodes(model, layer) for layer in range(2)]
    for layer, nodes in enumerate(attention):
        kinds = [node.op_type for node in nodes]
        # Four products: query_key_value, scores, context, dense.
        assert kinds.count("Softmax") == 1 and kinds.count("MatMul") == 4 and kinds.count("Where") == 1
        written = {name for node in nodes for name in node.output}
        assert {f"present.{layer}.key", f"present.{layer}.value"} <= written
        assert f"present.{1 - layer}.key" not in written
    names = [{node.name for node in nodes} for nodes in attention]
    assert names[0].isdisjoint(names[1])
    mlp = layer_nodes(model, 1, "mlp")
    assert [node.op_type for node in mlp].count("Tanh") == 1 and names[1].isdisjoint(node.name for node in mlp)
    whole = {node.name for node in layer_nodes(model, 1, "")}
    assert names[1] | {node.name for node in mlp} < whole
    for layer, part in ((2, "attention"), (0, "feed_forward")):
        with pytest.raises(WorkbookError, match=f"no node of transformer.layers.{layer}.{part}"):
            layer_nodes(model, layer, part)


def test_netron_serves_the_graph_and_leaves_logging_alone(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    import netron

    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])  # pytest's own would hide that netron adds one
    level = root.level
    first = netron_view(path_of(checkpoint))
    second = netron_view(path_of(checkpoint, "fp32"), height=321)
    try:
        assert first.src != second.src and second.height == 321
        served = urllib.request.urlopen(f"{second.src}/data/model.fp32.onnx", timeout=10).read()
        assert served == path_of(checkpoint, "fp32").read_bytes()
        # The view before is gone, instead of showing the new graph under its old address.
        with pytest.raises(OSError):
            urllib.request.urlopen(first.src, timeout=1)
        assert root.handlers == [] and root.level == level
    finally:
        netron.stop()
