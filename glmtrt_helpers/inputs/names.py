"""Names and order of what goes into `forward` and comes out of it.

Inputs are flat mappings from a tensor's name to the tensor, in the order of `input_names`, everywhere in the project;
`forward_kwargs` nests them for PyTorch. past and present are sequence first: (past, batch, heads, d).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # names need no PyTorch
    import torch


def input_names(num_layers: int) -> list[str]:
    """Names of forward's 3 + 2 * num_layers inputs, in order."""
    past = [f"past_key_values.{i}.{part}" for i in range(num_layers) for part in ("key", "value")]
    return ["input_ids", "position_ids", "attention_mask", *past]


def output_names(num_layers: int) -> list[str]:
    """Names of forward's 1 + 2 * num_layers outputs, in order."""
    return ["logits"] + [f"present.{i}.{part}" for i in range(num_layers) for part in ("key", "value")]


def forward_kwargs(flat: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Nest flat inputs for `model.forward`; without past tensors, past_key_values is None."""
    num_layers = sum(name.endswith(".key") for name in flat)
    past = tuple((flat[f"past_key_values.{i}.key"], flat[f"past_key_values.{i}.value"]) for i in range(num_layers))
    given = {name: flat[name] for name in ("input_ids", "position_ids", "attention_mask") if name in flat}
    return {**given, "past_key_values": past or None, "use_cache": True, "return_dict": False}


def flat_outputs(outputs: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Name what `forward(return_dict=False)` returns: (logits, presents, ...)."""
    logits, presents = outputs[0], outputs[1]
    flat = [logits] + [tensor for layer in presents for tensor in layer]
    return dict(zip(output_names(len(presents)), flat, strict=True))
