"""What is done to a traced graph before it is written: fold constants, drop the exporter's notes, name dimensions."""

import re
from collections.abc import Collection

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint

# The default rules of onnxscript that match something here. `optimize_ir` applies all of them, and one that matches
# nothing, slice_split_rule, walks the whole graph for each node: two fifths of the time of an export.
_RULES = (
    rules.mul_by_1_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.squeeze_reshape_1d_rule,
    rules.materialize_reshape_shape_rule,
    rules.unsqueeze_unsqueeze_rule,
)
# Folded with PyTorch: the last bit of a cosine depends on the library, and a stored table must be the model's own.
_PYTORCH_FOLDS = {"Cos": torch.cos, "Sin": torch.sin}
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
# Where a dimension's symbol is read: its name, an input, and the input's axis.
_DIMENSIONS = (
    ("batch", "input_ids", 0),
    ("sequence", "input_ids", 1),
    ("past", "past_key_values.0.key", 0),
    ("total", "attention_mask", 3),
)


def simplify(model: ir.Model, checkpoint: Checkpoint, weights: Collection[str]) -> None:
    """Fold constants, the rotary tables above all, but no node that reads a weight; keep one copy of each table.

    weights: names of the initializers that are weights. inv_freq may be among them: it is folded into the tables.

    The tables must be constants: a fused kernel would skip the rounding of the fp16 angle between the multiplication
    and the cosine, and late positions would be rotated by a different angle than in PyTorch.
    """
    kept = {name for name in weights if "inv_freq" not in name}
    for name in kept & model.graph.initializers.keys():
        model.graph.initializers[name].const_value = None
    table_bytes = 64 * checkpoint.max_length * checkpoint.head_size
    passes.InlinePass()(model)
    for _ in range(2):  # a rewrite can leave new constants to fold, and folding new nodes to rewrite
        optimizer.fold_constants(
            model,
            onnx_shape_inference=True,
            should_fold=lambda node: _may_fold(node, kept),
            input_size_limit=table_bytes,
            output_size_limit=table_bytes,
        )
        _fold_with_pytorch(model.graph)
        RewritePass(_RULES)(model)
        passes.RemoveUnusedNodesPass()(model)
    ir.passes.Sequential(
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(size_limit=table_bytes),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(model)
    _strip_metadata(model)


def _may_fold(node: ir.Node, weights: Collection[str]) -> bool | None:
    """False keeps a node; None leaves the choice to onnxscript."""
    reads_weight = any(value is not None and value.name in weights for value in node.inputs)
    return False if reads_weight or node.op_type in _PYTORCH_FOLDS else None


def _fold_with_pytorch(graph: ir.Graph) -> None:
    """Replace the cosines and sines of constants by PyTorch's."""
    for node in graph:
        if node.op_type not in _PYTORCH_FOLDS or node.inputs[0] is None:
            continue
        angles = ir.convenience.get_const_tensor(node.inputs[0])
        if angles is not None:
            table = _PYTORCH_FOLDS[node.op_type](torch.from_numpy(angles.numpy().copy()))
            constant = ir.node("Constant", [], {"value": ir.tensor(table.numpy())})
            graph.insert_before(node, constant)
            ir.convenience.replace_all_uses_with(node.outputs[0], constant.outputs[0])


def _strip_metadata(model: ir.Model) -> None:
    """Keep of the exporter's notes only which module a node came from: stack traces name one machine's folders."""
    graph = model.graph
    for node in graph:
        scopes = node.metadata_props.get(_SCOPES_KEY)
        node.metadata_props.clear()
        node.doc_string = None
        if scopes:
            node.metadata_props[_SCOPES_KEY] = scopes
    for value in (*_activations(graph), *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    model.metadata_props.clear()
    graph.name = "chatglm"


def _activations(graph: ir.Graph) -> list[ir.Value]:
    """The graph's inputs and every output of its nodes."""
    return [*graph.inputs, *(value for node in graph for value in node.outputs)]


def name_dimensions(model: ir.Model) -> None:
    """Rename dynamo's symbols (s18, s17 + s22, ...) to batch, sequence, past and total, everywhere in the graph."""
    shapes = {value.name: value.shape for value in model.graph.inputs}
    names: dict[str, str] = {}
    for dimension, name, axis in _DIMENSIONS:
        shape = shapes.get(name)
        if shape is not None:
            names.setdefault(str(shape[axis]), dimension)
    for value in _activations(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])


def _renamed(dim: int | ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    text = re.sub(r"\w+", lambda symbol: names.get(symbol[0], symbol[0]), str(dim))
    return re.sub(r"past \+ sequence|sequence \+ past", "total", text)
