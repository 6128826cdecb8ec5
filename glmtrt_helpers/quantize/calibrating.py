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
from glmtrt_helpers.core.errors import WorkbookError
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
    Raises WorkbookError for a weight that is not finite, and for a sequence that is too long for the checkpoint.
    """
    if (longest := max(map(len, sequences))) > checkpoint.max_length:
        raise WorkbookError(
            f"{checkpoint.directory} has {checkpoint.max_length} positions, and a conversation to calibrate with has "
            f"{longest} tokens: shorten it."
        )
    model: Any = loading.load_bounded(checkpoint, torch.float32)
    call = positions_and_mask.prefill(checkpoint, sequences)
    is_token = torch.tensor([[column >= longest - len(ids) for column in range(longest)] for ids in sequences])
    for number in range(checkpoint.num_layers):
        layer = model.get_submodule(f"transformer.layers.{number}")
        quantizer = functools.partial(_quantize, checkpoint, number, bits, group)
        _quantize_layer(layer, number, is_token, quantizer, stored, finished)
    with torch.inference_mode(), in_remote_code():
        model.transformer(**{name: torch.from_numpy(array) for name, array in call.items()}, use_cache=False)


def _quantize(
    checkpoint: Checkpoint, layer: int, bits: int, group: int, name: str, weight: torch.Tensor, inputs: torch.Tensor
) -> tuple[tuple[np.ndarray, np.ndarray], torch.Tensor]:
    """The integers and scales of a matrix of a layer, and the weights that they stand for. inputs: (tokens, k)."""
    try:
        values, scale = gptq(weight, inputs.T @ inputs, bits, group)
    except ValueError as error:
        raise WorkbookError(
            f"{checkpoint.directory}: 'transformer.layers.{layer}.{name}.weight' cannot be quantised, {error}: "
            "download the checkpoint again."
        ) from None
    wide = np.repeat(scale.T, group, axis=1) if group else scale[:, None]
    return (values, scale), torch.from_numpy(values * wide.astype(np.float32))


def _quantize_layer(
    layer: torch.nn.Module,
    number: int,
    is_token: torch.Tensor,
    quantizer: Callable[[str, torch.Tensor, torch.Tensor], tuple[tuple[np.ndarray, np.ndarray], torch.Tensor]],
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
        else:  # inputs are (sequence, batch, k); padding says nothing about a chat
            made[name], replacement = quantizer(name, module.weight, inputs[0][is_token.T].float())
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
