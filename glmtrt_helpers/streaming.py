"""Run a model that does not fit into memory: each part gets its weights when it is called, and gives them back."""

from __future__ import annotations

from typing import Any

import torch

from glmtrt_helpers import checkpoints
from glmtrt_helpers.checkpoints import Checkpoint


def load_streamed(checkpoint: Checkpoint, dtype: torch.dtype, **options: Any) -> torch.nn.Module:
    """`checkpoints.load_model` that holds one layer at a time, or one vocabulary matrix, in dtype.

    Every call reads all weights: for comparing, not for chatting. Results are those of the whole model.
    """
    model = checkpoints.load_model(checkpoint, dtype, meta=True, **options)
    layers = [name for name, _ in model.named_modules() if _is_layer(name)]
    outside = {
        name.rpartition(".")[0] for name, _ in model.named_parameters() if not any(_within(name, at) for at in layers)
    }
    for name in (*layers, *sorted(outside)):
        _stream(model.get_submodule(name), name, checkpoint, dtype)
    return model


def load_bounded(checkpoint: Checkpoint, dtype: torch.dtype, **options: Any) -> torch.nn.Module:
    """The model in memory that a laptop has: fp16 weights are mapped as stored, a large model in fp32 is streamed."""
    load = load_streamed if checkpoint.is_large and dtype == torch.float32 else checkpoints.load_model
    return load(checkpoint, dtype, **options)


def _is_layer(name: str) -> bool:
    parent, _, number = name.rpartition(".")
    return number.isdigit() and parent.endswith("layers")


def _within(parameter: str, module: str) -> bool:
    return parameter.startswith(module + ".")


def _stream(module: torch.nn.Module, name: str, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    own = [parameter for parameter, _ in module.named_parameters()]

    def fill(*_: Any) -> None:
        read = checkpoints.read_tensors(checkpoint, [f"{name}.{parameter}" for parameter in own], dtype)
        module.load_state_dict({p: read[f"{name}.{p}"] for p in own}, strict=False, assign=True)

    def empty(*_: Any) -> None:
        nothing = {parameter: tensor.to("meta") for parameter, tensor in module.named_parameters()}
        module.load_state_dict(nothing, strict=False, assign=True)

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(empty, always_call=True)
