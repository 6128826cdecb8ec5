"""What is done to a traced graph before it is written: fold constants, name dimensions, point weights into shards."""

import re
from collections.abc import Collection

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint

# Those of onnxscript's default rules that find something here. `optimize_ir` applies them all, and one that finds
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


def tidy(model: ir.Model, checkpoint: Checkpoint, weights: Collection[str]) -> None:
    """Fold what is constant, the rotary tables above all, but nothing that touches a weight; keep one of each table.

    weights: names of the initializers that are weights.

    The tables must be constants: a fused kernel would leave out the rounding of the fp16 angle between product and
    cosine, and late positions would turn by another angle than PyTorch's. Their cosines are PyTorch's own.
    """
    for name, initializer in model.graph.initializers.items():
        if name in weights and "inv_freq" not in name:
            initializer.const_value = None

    def should_fold(node: ir.Node) -> bool | None:
        if node.op_type in _PYTORCH_FOLDS:
            return False
        touches_weight = any(value is not None and value.name in weights for value in node.inputs)
        return False if touches_weight and "inv_freq" not in str(node.inputs) else None

    table_bytes = 64 * checkpoint.max_length * checkpoint.head_size
    passes.InlinePass()(model)
    for _ in range(2):  # what a rule leaves may be constant, and the other way round
        optimizer.fold_constants(
            model, onnx_shape_inference=True, should_fold=should_fold, input_size_limit=table_bytes,
            output_size_limit=table_bytes,
        )  # fmt: skip
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
    for node in model.graph:
        # Which layer a node came from is worth keeping; stack traces name the folders of one machine.
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        node.metadata_props.clear()
        node.doc_string = None
        if scopes:
            node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = "chatglm"


def _fold_with_pytorch(graph: ir.Graph) -> None:
    """Replace the cosines and sines of constants by what PyTorch computes for them."""
    for node in graph:
        if node.op_type not in _PYTORCH_FOLDS or node.inputs[0] is None:
            continue
        angles = ir.convenience.get_const_tensor(node.inputs[0])
        if angles is not None:
            table = _PYTORCH_FOLDS[node.op_type](torch.from_numpy(angles.numpy().copy()))
            constant = ir.node("Constant", [], {"value": ir.tensor(table.numpy())})
            graph.insert_before(node, constant)
            ir.convenience.replace_all_uses_with(node.outputs[0], constant.outputs[0])


def name_dimensions(model: ir.Model) -> None:
    """Give the symbols of dynamo (s18, s17 + s22, ...) the names a reader expects, everywhere in the graph."""
    shapes = {value.name: value.shape for value in model.graph.inputs}
    places = [("batch", "input_ids", 0), ("sequence", "input_ids", 1), ("past", "past_key_values.0.key", 0),
              ("total", "attention_mask", 3)]  # fmt: skip
    names: dict[str, str] = {}
    for dimension, name, axis in places:
        shape = shapes.get(name)
        if shape is not None:
            names.setdefault(str(shape[axis]), dimension)
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])


def _renamed(dim: int | ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    text = re.sub(r"\w+", lambda symbol: names.get(symbol[0], symbol[0]), str(dim))
    return re.sub(r"past \+ sequence|sequence \+ past", "total", text)
