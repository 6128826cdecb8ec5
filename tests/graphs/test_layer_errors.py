"""Layer by layer: a right graph is within its tolerance everywhere, and a damaged place is named."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.exporting import Damage, editing, exported_copy, one_thread, replace_weight, set_alpha_once
from test_verification import QKV, Changed, damaged, nudge

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.graphs.layer_errors import compare_layers, first_difference, mark_layers
from glmtrt_helpers.graphs.plots import plot_layer_errors
from glmtrt_helpers.sessions.onnxruntime import OrtSession

__all__ = ["one_thread"]  # a fixture that every test here uses


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return exported_copy(tmp_path)


def test_layers_of_a_right_graph_are_all_within(checkpoint: Checkpoint) -> None:
    before = {path.name for path in checkpoint.directory.iterdir()}
    for dtype in ("fp16", "fp32"):
        errors = compare_layers(checkpoint, dtype)
        assert all(error.ok for error in errors) and first_difference(errors) is None
        assert [error.name for error in errors if error.point.layer in (None, 1)] == [
            "embeddings", "layer 1 input_layernorm", "layer 1 softmax", "layer 1 attention", "layer 1 attention.dense",
            "layer 1 attention residual", "layer 1 post_attention_layernorm", "layer 1 mlp", "layer 1 output",
            "final_layernorm", "logits",
        ]  # fmt: skip
        # A gather of fp16 weights is exact; what follows is computed, and rounded in fp16. In fp32 both may agree.
        assert errors[0].error == 0 and all(error.error > 0 or dtype == "fp32" for error in errors[1:])
        assert len({error.point.tensor for error in errors}) == len(errors) == 19
    assert {path.name for path in checkpoint.directory.iterdir()} == before


PLACES: dict[str, tuple[Damage, str]] = {
    "embedding": (replace_weight("transformer.word_embeddings.weight"), "embeddings"),
    "layernorm": (replace_weight("transformer.layers.1.input_layernorm.bias"), "layer 1 input_layernorm"),
    "qkv": (replace_weight(QKV), "layer 1 softmax"),
    "dense": (replace_weight("transformer.layers.1.attention.dense.weight"), "layer 1 attention.dense"),
    "alpha": (set_alpha_once(1, 0, 7), "layer 1 attention residual"),
    "layernorm 2": (replace_weight("transformer.layers.0.post_attention_layernorm.bias"),
                    "layer 0 post_attention_layernorm"),
    "mlp": (replace_weight("transformer.layers.1.mlp.dense_4h_to_h.bias"), "layer 1 mlp"),
    "alpha 2": (set_alpha_once(0, 1, 7), "layer 0 output"),
    "final": (replace_weight("transformer.final_layernorm.weight"), "final_layernorm"),
    "head": (replace_weight("lm_head.weight"), "logits"),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_the_damaged_place_is_named(checkpoint: Checkpoint, place: str) -> None:
    damage, name = PLACES[place]
    for dtype in ("fp16", "fp32") if place in ("qkv", "alpha") else ("fp16",):
        path = damaged(checkpoint, dtype, damage)
        first = first_difference(compare_layers(checkpoint, dtype, onnx_path=path))
        assert first is not None and first.name == name


def test_layers_of_another_session(checkpoint: Checkpoint) -> None:
    """An engine built from the marked graph can be compared in ONNX Runtime's place."""
    marked = checkpoint.directory / "marked.onnx"
    points = mark_layers(checkpoint.directory / "model.fp32.onnx", marked, 2)
    session = OrtSession(marked)
    changed = next(point for point in points if point.name == "layer 0 mlp")
    errors = compare_layers(checkpoint, "fp32", session=Changed(session, nudge(changed.tensor, 1e-2)))
    assert [error.name for error in errors if not error.ok] == ["layer 0 mlp"]
    assert next(error.error for error in errors if not error.ok) == pytest.approx(1e-2, rel=0.01)
    with pytest.raises(WorkbookError, match="build it from the graph of `mark_layers`"):
        compare_layers(checkpoint, session=OrtSession(checkpoint.directory / "model.fp16.onnx"))


def test_a_graph_without_scopes_has_no_layers(checkpoint: Checkpoint) -> None:
    with editing(checkpoint.directory / "model.fp16.onnx") as model:
        for node in model.graph.node:
            del node.metadata_props[:]
    with pytest.raises(WorkbookError, match="do not tell which module"):
        compare_layers(checkpoint)
    assert not (checkpoint.directory / "model.fp16.layers.onnx").exists()


def test_the_plot_marks_the_first_layer_beyond(checkpoint: Checkpoint) -> None:
    path = damaged(checkpoint, "fp16", PLACES["mlp"][0])
    errors = compare_layers(checkpoint, onnx_path=path)
    (axis,) = plot_layer_errors(errors).axes
    assert axis.get_yscale() == "log" and "largest" in axis.get_ylabel()
    assert [text.get_text() for text in axis.texts] == ["first beyond: layer 1 mlp"]
    lines = {str(line.get_label()): np.asarray(line.get_ydata()) for line in axis.lines}
    at = [error.name for error in errors].index("layer 1 mlp")
    assert lines["the graph"][at] == pytest.approx(errors[at].error / errors[at].scale)
    assert (lines["the graph"] <= lines["allowed"]).tolist() == [error.ok for error in errors]
    assert "PyTorch fp16" in lines and (lines["PyTorch fp16"] > 0).all()
    # The embeddings are exact, and still on the picture.
    assert errors[0].error == 0 and 0 < lines["the graph"][0] < lines["the graph"][1:].min()
    assert [label.get_text() for label in axis.get_xticklabels()] == [error.name for error in errors]
    right = [replace(error, error=0.0) for error in errors]
    assert not plot_layer_errors(right).axes[0].texts
    # 28 layers have no room for every name.
    many = [replace(e, point=replace(e.point, layer=i)) for i in range(28) for e in errors[1:9]]
    labels = [label.get_text() for label in plot_layer_errors(many).axes[0].get_xticklabels()]
    assert labels == [f"layer {i}" for i in range(28)]
