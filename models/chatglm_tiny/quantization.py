"""Weight-only quantisation of the linear layers: int8 rows with one scale each, dequantised when used."""

import torch
from torch import nn


class QuantizedLinear(nn.Module):
    def __init__(self, linear: nn.Linear, weight_bit_width: int = 8):
        super().__init__()
        limit = 2 ** (weight_bit_width - 1) - 1
        weight = linear.weight.data
        scale = weight.abs().amax(dim=-1, keepdim=True).float().clamp_min(1e-8) / limit
        self.register_buffer("weight", torch.round(weight.float() / scale).to(torch.int8))
        self.register_buffer("weight_scale", scale.to(weight.dtype))
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.weight_scale.to(x.dtype), self.bias)


def quantize(model, weight_bit_width):
    """Replace the four matrices of every layer; returns the model."""
    if weight_bit_width not in (4, 8):
        raise ValueError(f"weights are quantised to 4 or 8 bits, not {weight_bit_width}")
    for layer in model.layers:
        for owner, names in (
            (layer.attention, ("query_key_value", "dense")),
            (layer.mlp, ("dense_h_to_4h", "dense_4h_to_h")),
        ):
            for name in names:
                setattr(owner, name, QuantizedLinear(getattr(owner, name), weight_bit_width))
    return model
