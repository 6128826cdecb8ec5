"""Every fault that a graph can have is named in one sentence, and a good export has none."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import helper, numpy_helper, parser
from support.exporting import editing, path_of

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.export import exporting
from glmtrt_helpers.graphs.checks import StaticDimension, dead_inputs, missing_inputs, problems, static_dimensions
from glmtrt_helpers.graphs.scopes import GraphIndex
from glmtrt_helpers.graphs.summary import summarize


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
def test_a_static_dimension_is_found(checkpoint: Checkpoint, tensor: str, axis: int, meaning: str) -> None:
    with editing(path_of(checkpoint)) as model:
        value = next(v for v in [*model.graph.input, *model.graph.output] if v.name == tensor)
        value.type.tensor_type.shape.dim[axis].dim_value = 1
    assert static_dimensions(load_graph(path_of(checkpoint))) == [StaticDimension(tensor, axis, meaning, 1)]
    (sentence,) = problems(path_of(checkpoint), checkpoint)
    assert f"axis {axis} of {tensor} ({meaning}) is static (1)" in sentence


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


def test_an_input_that_is_gone_is_missing(checkpoint: Checkpoint) -> None:
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


def test_weights_of_another_name_or_shape_are_problems(checkpoint: Checkpoint) -> None:
    with editing(path_of(checkpoint, "fp32")) as model:
        next(tensor for tensor in model.graph.initializer if tensor.name == "lm_head.weight").name = "folded"
    (sentence,) = problems(path_of(checkpoint, "fp32"), checkpoint)
    assert sentence.startswith("weights that are not the checkpoint's: 1, the first: lm_head.weight is not an init")
    # What is stored in a shard is a parameter under any name.
    assert summarize(path_of(checkpoint, "fp32")).parameters == summarize(path_of(checkpoint)).parameters
    smaller = replace(checkpoint, config={**checkpoint.config, "inner_hidden_size": 128})
    assert "has shape (256, 64) instead of (128, 64)" in problems(path_of(checkpoint, "fp32"), smaller)[0]


def freeze(kind: str, module: str, sizes: dict[int, int]) -> Callable[[onnx.ModelProto], None]:
    """Give constant sizes to some axes of the target of the first Reshape of a module."""

    def damage(model: onnx.ModelProto) -> None:
        index = GraphIndex(model)
        node = next(n for n, s in zip(index.nodes, index.scopes, strict=True) if n.op_type == kind and s == module
                    and len(index.nodes[index.producer[n.input[1]]].input) > 2)  # fmt: skip
        concat = index.nodes[index.producer[node.input[1]]]
        for axis, size in sizes.items():
            model.graph.initializer.append(numpy_helper.from_array(np.array([size]), f"frozen_{axis}"))
            concat.input[axis] = f"frozen_{axis}"

    return damage


def graph_with(node: str) -> onnx.ModelProto:
    """A graph of one node over a hidden state of dynamic batch and sequence."""
    text = f"""<ir_version: 8, opset_import: ["" : 18]>
        g (float[batch, sequence, 64] hidden) => (float[a, b, c] output) {{ {node} }}"""
    return parser.parse_model(text)


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ("shape = Constant <value_ints = [1, -1, 64]> () output = Reshape (hidden, shape)", "a part of 1:"),
        ("shape = Constant <value_ints = [2, -1, 64]> () output = Reshape (hidden, shape)", "a part of 2 x 64:"),
        ("shape = Constant <value_ints = [-1, 5, 64]> () output = Reshape (hidden, shape)", "a part of 5 x 64:"),
        ("shape = Constant <value_ints = [2, 5, 64]> () output = Expand (hidden, shape)", "a part of 5 x 2:"),
        ("shape = Constant <value_ints = [1, 0, 4, 16]> () output = Reshape (hidden, shape)", "a part of 1:"),
        ("shape = Constant <value_ints = [1, -1, 4, 16]> () output = Reshape (hidden, shape)", "a part of 1:"),
        ("shape = Constant <value_ints = [1, 5, 4, 16]> () output = Reshape (hidden, shape)", "a part of 1:"),
        ("shape = Constant <value_ints = [0, 0, 4, 16]> () output = Reshape (hidden, shape)", ""),
        ("shape = Constant <value_ints = [1, 0, -1, 64]> () output = Reshape (hidden, shape)", ""),  # a new axis
        ("shape = Constant <value_ints = [0, 0, 64]> () output = Reshape (hidden, shape)", ""),
        ("shape = Constant <value_ints = [1, 1, 64]> () output = Expand (hidden, shape)", ""),
        ("shape = Constant <value_ints = [0, -1, 16]> () output = Reshape (hidden, shape)", ""),
        ("shape = Constant <value_ints = [1, -1, 32]> () output = Reshape (hidden, shape)", ""),  # may be right
    ],
)
def test_a_size_that_became_a_constant_is_found_whatever_it_is(node: str, says: str, tmp_path: Path) -> None:
    onnx.save(graph_with(node), tmp_path / "model.onnx")
    found = problems(tmp_path / "model.onnx")
    assert len(found) == bool(says) and all(says in sentence for sentence in found), found


def test_a_batch_that_became_a_constant_inside_the_graph_is_found(checkpoint: Checkpoint) -> None:
    """Inputs and outputs say that the batch is dynamic; a Reshape in the middle knows only the example's."""
    module = "transformer.layers.0.attention"
    with editing(path_of(checkpoint)) as model:
        freeze("Reshape", module, {1: 2})(model)
    (sentence,) = problems(path_of(checkpoint), checkpoint)
    assert sentence.startswith("Reshape node_view") and f"in {module} turns a dynamic dimension into a part of 2 x" in (
        sentence
    )


@pytest.mark.parametrize(
    ("exporter", "opset"), [("dynamo", 19), ("dynamo", 21), ("dynamo", 23), ("dynamo", 24), ("torchscript", 17),
                            ("torchscript", 20)])  # fmt: skip
@pytest.mark.slow
def test_nothing_is_found_in_sound_exports(checkpoint: Checkpoint, exporter: str, opset: int) -> None:
    path = exporting.export_model(checkpoint, "fp32", exporter=exporter, opset=opset).path
    assert problems(path) == problems(path, checkpoint) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "GPT2"])
def test_nothing_is_found_in_other_models(kind: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    if kind != "GPT2":
        sizes["num_key_value_heads"] = 2
    config = getattr(transformers, f"{kind}Config")(**sizes, use_cache=False)
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    path = tmp_path / "model.onnx"
    with exporting.quiet():
        torch.onnx.export(
            model,
            (torch.zeros(2, 5, dtype=torch.int64),),
            str(path),
            dynamo=True,
            verbose=False,
            dynamic_shapes={"input_ids": {0: batch, 1: sequence}},
        )
    assert problems(path) == []


def test_a_cache_that_begins_with_the_batch_is_another_models(tmp_path: Path) -> None:
    """A Llama has (batch, heads, past, size), where ChatGLM has (past, batch, heads, size)."""

    def graph(cache: list[str | int]) -> onnx.ModelProto:
        ids = helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["batch", "sequence"])
        past = helper.make_tensor_value_info("past_key_values.0.key", onnx.TensorProto.FLOAT, cache)
        out = helper.make_tensor_value_info("present.0.key", onnx.TensorProto.FLOAT, cache)
        node = helper.make_node("Identity", ["past_key_values.0.key"], ["present.0.key"])
        return helper.make_model(helper.make_graph([node], "cache", [ids, past], [out]))

    assert static_dimensions(graph(["batch", 4, "past", 16])) == []
    found = static_dimensions(graph(["past", 1, 4, 16]))
    assert [(each.tensor, each.axis) for each in found] == [("past_key_values.0.key", 1), ("present.0.key", 1)]
