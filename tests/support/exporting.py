"""One export of a random checkpoint for all tests that look at graphs, and ways to damage a copy of it."""

import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from support.checkpoints import make_random

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.export import exporting
from glmtrt_helpers.graphs.scopes import GraphIndex
from glmtrt_helpers.patches import patching
from glmtrt_helpers.sessions.onnxruntime import OrtSession

QKV = "transformer.layers.1.attention.query_key_value.weight"
Damage = Callable[[onnx.ModelProto], None]


@functools.cache
def _master() -> tempfile.TemporaryDirectory[str]:
    """Patched and exported in both precisions, once for all test files; the folder goes when the process ends."""
    folder: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory(prefix="glmtrt_exported_")
    directory = make_random(Path(folder.name) / "chatglm_random")
    patching.patch_checkpoint(directory)
    for dtype in ("fp16", "fp32"):
        exporting.export_model(open_checkpoint(directory), dtype)
    return folder


def exported_copy(tmp_path: Path) -> Checkpoint:
    """A private copy of the exported checkpoint: 2 layers, hidden 64, 4 heads, 1024 positions."""
    target = shutil.copytree(Path(_master().name) / "chatglm_random", tmp_path / "chatglm_random")
    return open_checkpoint(target)


def path_of(checkpoint: Checkpoint, dtype: str = "fp16") -> Path:
    return exporting.onnx_path(checkpoint, dtype)


@contextmanager
def editing(path: Path) -> Iterator[onnx.ModelProto]:
    """Load a graph without its weights and write it back as the block left it."""
    model = onnx.load(str(path), load_external_data=False)
    yield model
    onnx.save(model, str(path))


def _inline(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    stored = [attribute.t for node in model.graph.node if node.op_type == "Constant" for attribute in node.attribute]
    return [*stored, *(tensor for tensor in model.graph.initializer if not tensor.external_data)]


def set_scalar(old: float, new: float) -> Damage:
    """Change a floating-point constant of the graph, wherever it stands."""

    def damage(model: onnx.ModelProto) -> None:
        changed = 0
        for tensor in _inline(model):
            array = numpy_helper.to_array(tensor)
            if array.size == 1 and array.dtype.kind == "f" and np.allclose(array, old, rtol=1e-3):
                tensor.CopyFrom(numpy_helper.from_array(np.full_like(array, new), tensor.name))
                changed += 1
        assert changed, f"no constant {old} in the graph"

    return damage


def set_tables(change: Callable[[np.ndarray], np.ndarray]) -> Damage:
    """Change the rotary tables."""

    def damage(model: onnx.ModelProto) -> None:
        tables = [tensor for tensor in _inline(model) if len(tensor.dims) > 1 and tensor.dims[0] == 1024]
        assert tables
        for tensor in tables:
            tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), tensor.name))

    return damage


def swap_past(layer: int) -> Damage:
    """Read the cached values of a layer as keys, and its keys as values."""

    def damage(model: onnx.ModelProto) -> None:
        names = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        turned = dict(zip(names, names[::-1], strict=True))
        for node in model.graph.node:
            for i, name in enumerate(node.input):
                node.input[i] = turned.get(name, name)

    return damage


def shift_weight(name: str, by: int) -> Damage:
    """Read a weight from some bytes further on in its shard."""

    def damage(model: onnx.ModelProto) -> None:
        entries = {entry.key: entry for tensor in model.graph.initializer if tensor.name == name
                   for entry in tensor.external_data}  # fmt: skip
        entries["offset"].value = str(int(entries["offset"].value) + by)

    return damage


def replace_weight(name: str) -> Damage:
    """Put noise in the place of a weight."""

    def damage(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        noise = np.random.default_rng(0).normal(0, 0.05, tuple(tensor.dims)).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(noise, name))

    return damage


def set_alpha_once(layer: int, which: int, new: float) -> Damage:
    """Change the factor of one residual: which 0 is the attention's, 1 the feed-forward part's."""

    def damage(model: onnx.ModelProto) -> None:
        index = GraphIndex(model)
        scope = f"transformer.layers.{layer}"
        nodes = [n for n, s in zip(index.nodes, index.scopes, strict=True) if s == scope and n.op_type == "Mul"]
        old = next(index.initializers[name] for name in nodes[which].input if name in index.initializers)
        array = numpy_helper.to_array(old)
        model.graph.initializer.append(numpy_helper.from_array(np.full_like(array, new), "another_alpha"))
        for i, name in enumerate(nodes[which].input):
            if name == old.name:
                nodes[which].input[i] = "another_alpha"

    return damage


def damaged(checkpoint: Checkpoint, dtype: str, damage: Damage) -> Path:
    """The graph of the checkpoint, damaged in place."""
    path = path_of(checkpoint, dtype)
    with editing(path) as model:
        damage(model)
    return path


class Changed:
    """A session whose outputs go through a function."""

    dtype = torch.float32
    arithmetic = None
    last_only = False

    def __init__(self, session: OrtSession, change: Callable[[dict[str, torch.Tensor]], None]):
        self.session, self.change = session, change

    def run(self, flat: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        outputs = {name: torch.tensor(array) for name, array in self.session.run(flat).items()}
        self.change(outputs)
        return outputs


def nudge(name: str, by: float) -> Callable[[dict[str, torch.Tensor]], None]:
    """Add to the last element of an output."""

    def change(outputs: dict[str, torch.Tensor]) -> None:
        outputs[name].view(-1)[-1] += by

    return change
