"""Record what every matrix is multiplied with, layer by layer, and quantise it before the next layer is computed.

One call of forward does it all: before a matrix is used its inputs are there, those that the quantised layers before it
give. So each layer makes up for the errors of the earlier ones, and the memory is that of one layer.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.remote_code import in_remote_code
from glmtrt_helpers.inputs import positions_and_mask
from glmtrt_helpers.quantize.gptq import gptq

MATRICES = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
Matrices = dict[str, tuple[np.ndarray, np.ndarray]]


def calibrate(
    checkpoint: Checkpoint,
    sequences: Sequence[Sequence[int]],
    bits: int,
    group: int,
    stored: Callable[[int], dict[str, torch.Tensor] | None],
    finished: Callable[[int, Matrices], None],
) -> None:
    """Quantise the matrices of every layer by `gptq`.

    sequences: ids of conversations, each with [gMASK] and <sop>. stored: the dequantised matrices of a layer that was
    finished by an earlier run, by name within the layer; None: it is to be done. finished: called with a layer's number
    and, by the same names, its integers and scales.
    Raises ValueError, naming the weight, where it is not finite.
    """
    model: Any = loading.load_bounded(checkpoint, torch.float32)
    call = positions_and_mask.prefill(checkpoint, sequences)
    length = max(map(len, sequences))
    is_token = torch.tensor([[column >= length - len(ids) for column in range(length)] for ids in sequences])
    for number in range(checkpoint.num_layers):
        layer = model.get_submodule(f"transformer.layers.{number}")
        _quantize_layer(layer, number, is_token, bits, group, stored, finished)
    with torch.inference_mode(), in_remote_code():
        model.transformer(**{name: torch.from_numpy(array) for name, array in call.items()}, use_cache=False)


def _quantize_layer(
    layer: torch.nn.Module,
    number: int,
    is_token: torch.Tensor,
    bits: int,
    group: int,
    stored: Callable[[int], dict[str, torch.Tensor] | None],
    finished: Callable[[int, Matrices], None],
) -> None:
    made: Matrices = {}
    kept: dict[str, torch.Tensor] = {}

    def begin(*_: object) -> None:
        kept.update(stored(number) or {})

    def before(name: str, module: Any, inputs: tuple[torch.Tensor]) -> None:
        if name in kept:
            replacement = kept[name]
        else:
            weight = module.get_parameter("weight")
            # Inputs are (sequence, batch, k); padding says nothing about a chat.
            tokens = inputs[0][is_token.T].float()
            try:
                values, scale = made[name] = gptq(weight, tokens.T @ tokens, bits, group)
            except ValueError as error:
                raise ValueError(f"transformer.layers.{number}.{name}.weight: {error}") from None
            wide = np.repeat(scale.T, group, axis=1) if group else scale[:, None]
            replacement = torch.from_numpy(values * wide.astype(np.float32))
        module.weight = torch.nn.Parameter(replacement, requires_grad=False)

    def end(*_: object) -> None:
        if made:
            finished(number, dict(made))
        made.clear()
        kept.clear()

    layer.register_forward_pre_hook(begin)
    for name in MATRICES:
        matrix = layer.get_submodule(name)
        matrix.register_forward_pre_hook(functools.partial(before, name))
    layer.register_forward_hook(end)
