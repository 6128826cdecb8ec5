"""Names, order and dynamic axes of what goes into `forward` and comes out of it; needs no PyTorch.

Inputs are flat mappings from a tensor's name to the tensor, in the order of `input_names`, everywhere in the project;
`forward_kwargs` nests them for PyTorch. past and present are sequence first: (past, batch, heads, d).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

STEP_INPUTS = ("input_ids", "position_ids", "attention_mask")
PAST, PRESENT = "past_key_values.", "present."
_DYNAMIC_AXES = {
    "input_ids": {0: "batch", 1: "sequence"},
    "position_ids": {0: "batch", 2: "sequence"},
    "attention_mask": {0: "batch", 2: "sequence", 3: "total"},
    "past_key_values": {0: "past", 1: "batch"},
    "logits": {0: "batch", 1: "sequence"},
    "present": {0: "total", 1: "batch"},
}
_Tensor = TypeVar("_Tensor")


def input_names(num_layers: int) -> list[str]:
    """Names of forward's 3 + 2 * num_layers inputs, in order."""
    return [*STEP_INPUTS, *past_names(num_layers)]


def output_names(num_layers: int) -> list[str]:
    """Names of forward's 1 + 2 * num_layers outputs, in order."""
    return ["logits", *present_names(num_layers)]


def past_names(num_layers: int) -> list[str]:
    """`past_key_values.0.key`, `past_key_values.0.value`, ...: the cache that forward reads."""
    return [f"{PAST}{i}.{part}" for i in range(num_layers) for part in ("key", "value")]


def present_names(num_layers: int) -> list[str]:
    """`present.0.key`, `present.0.value`, ...: the cache that forward returns."""
    return [f"{PRESENT}{i}.{part}" for i in range(num_layers) for part in ("key", "value")]


def past_from(outputs: Mapping[str, _Tensor]) -> dict[str, _Tensor]:
    """The presents among the outputs of one call, renamed to the past of the next."""
    return {PAST + name.removeprefix(PRESENT): tensor for name, tensor in outputs.items() if name.startswith(PRESENT)}


def axis_names(tensor: str) -> dict[int, str]:
    """The axes of an input or output whose size differs between calls, and their names; none for another tensor.

    tensor: its name, as in `input_names`; `past_key_values` and `present` stand for those of all layers.
    The names are batch, sequence (new tokens), past (tokens in the cache) and total (past + sequence).
    """
    return _DYNAMIC_AXES.get(tensor.partition(".")[0], {})


def forward_kwargs(flat: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Nest flat inputs for `model.forward`; without past tensors, past_key_values is None."""
    names = past_names(sum(name.endswith(".key") for name in flat))
    past = tuple((flat[key], flat[value]) for key, value in zip(names[::2], names[1::2], strict=True))
    given = {name: flat[name] for name in STEP_INPUTS if name in flat}
    return {**given, "past_key_values": past or None, "use_cache": True, "return_dict": False}


def flat_outputs(outputs: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Name what `forward(return_dict=False)` returns: (logits, presents, ...)."""
    logits, presents = outputs[0], outputs[1]
    flat = [logits] + [tensor for layer in presents for tensor in layer]
    return dict(zip(output_names(len(presents)), flat, strict=True))
