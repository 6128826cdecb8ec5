"""Layer by layer: a correct graph is within its tolerance everywhere, and a damaged place is named."""

from pathlib import Path

import pytest
from support.checkpoints import ROOT
from support.exporting import QKV, Changed, Damage, damaged, editing, nudge, replace_weight, set_alpha_once

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.graphs.layer_errors import compare_layers, first_difference, load_errors, mark_layers, save_errors
from glmtrt_helpers.sessions.onnxruntime import OrtSession


def test_layers_of_a_correct_graph_are_all_within(checkpoint: Checkpoint) -> None:
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
    with pytest.raises(WorkbookError, match="build it from the graph that `mark_layers` writes"):
        compare_layers(checkpoint, session=OrtSession(checkpoint.directory / "model.fp16.onnx"))


def test_a_graph_without_scopes_has_no_layers(checkpoint: Checkpoint) -> None:
    with editing(checkpoint.directory / "model.fp16.onnx") as model:
        for node in model.graph.node:
            del node.metadata_props[:]
    with pytest.raises(WorkbookError, match="do not say which module"):
        compare_layers(checkpoint)
    assert not (checkpoint.directory / "model.fp16.layers.onnx").exists()


def test_errors_are_read_back_as_they_were_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for dtype in ("fp16", "fp32"):  # with and without PyTorch's own error
        errors = compare_layers(checkpoint, dtype)
        save_errors(errors, tmp_path / "errors.json", "one card, one runtime")
        assert load_errors(tmp_path / "errors.json") == (errors, "one card, one runtime")


@pytest.mark.parametrize("name", ["drift_6b_fp16", "drift_6b_fp32", "layer_errors_h200"])
def test_the_committed_errors_are_within_their_tolerances(name: str) -> None:
    errors, about = load_errors(ROOT / "benchmarks" / f"{name}.json")
    assert about and first_difference(errors) is None and errors[-1].name == "logits"
