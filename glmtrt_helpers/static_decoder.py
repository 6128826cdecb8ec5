"""The yardstick in PyTorch: the same decoder with a static cache and scaled_dot_product_attention, for a CUDA graph."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.nn import functional as F

from glmtrt_helpers.fast import Block, FastDecoder

StaticCache = list[tuple[torch.Tensor, torch.Tensor]]


class StaticDecoder(FastDecoder):
    """The weights of `fast` and the cache that PyTorch users give a model, written in place."""

    def move(self, device: str) -> None:
        """The tables, which are no parameters, to where the weights are."""
        cos, sin = (table.to(device) for table in self.tables)
        self.tables = cos, sin

    def empty_cache(self, batch: int, length: int, device: str = "cpu") -> StaticCache:
        """Keys and values of every layer, (batch, heads, length, d)."""
        weight, layers = self.lm_head.weight, cast(list[Block], self.transformer.layers)
        heads = layers[0].attention.heads
        shape = (batch, heads, length, weight.shape[1] // heads)
        made = [torch.zeros(shape, dtype=weight.dtype, device=device) for _ in range(2 * len(layers))]
        return list(zip(made[::2], made[1::2], strict=True))

    def step(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor | None,
        cache: StaticCache, past: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """S new tokens behind `past` in the cache; the mask is that of forward, (batch, 1, S, past + S), True = hidden;
        None where all is seen.

        Returns the next token (batch, 1) and the logits (batch, vocabulary) of the last position.
        """
        length = input_ids.shape[1]
        turn = tuple(self.turn(position_ids))
        mask = None if attention_mask is None else ~attention_mask
        hidden = self.transformer.word_embeddings(input_ids)
        layer: Any
        for layer, (keys, values) in zip(self.transformer.layers, cache, strict=True):
            x = layer.input_layernorm(hidden)
            query, key, value = layer.attention.project(x, turn)
            keys[:, :, past : past + length] = key
            values[:, :, past : past + length] = value
            used = slice(0, past + length)
            seen = F.scaled_dot_product_attention(query, keys[:, :, used], values[:, :, used], attn_mask=mask)
            attention = layer.attention.dense(seen.transpose(1, 2).reshape(x.shape))
            x = layer.post_attention_layernorm(layer.alpha * x + attention)
            hidden = layer.alpha * x + layer.mlp(x)
        logits = self.lm_head(self.transformer.final_layernorm(hidden[:, -1]))
        return logits.argmax(dim=-1, keepdim=True), logits
