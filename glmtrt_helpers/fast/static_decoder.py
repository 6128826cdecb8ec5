"""The yardstick in PyTorch: the parts of `fast`, a static cache, scaled_dot_product_attention; for a CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.fast.decoder import First, Last, Middle, turn
from glmtrt_helpers.fast.session import weight_names

StaticCache = list[tuple[torch.Tensor, torch.Tensor]]


class StaticDecoder(nn.Module):
    """The parts in a row, and the cache that PyTorch users give a model, written in place."""

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, blank_id: int):
        super().__init__()
        self.heads = config["num_attention_heads"]
        self.first, self.last = First(config, dtype, biased=True), Last(config, dtype, blank_id)
        self.middles = nn.ModuleList(Middle(config, dtype, biased=True) for _ in range(config["num_layers"] - 1))

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: str = "cpu") -> StaticDecoder:
        """With the checkpoint's weights; on the CPU and in their own dtype they stay mapped."""
        with torch.device("meta"):
            made = cls(checkpoint.config, dtype, load_tokenizer(checkpoint).blank_id)
        names: dict[str, str] = {}
        parts = [
            ("first", made.first),
            *((f"middles.{n}", part) for n, part in enumerate(made.middles)),
            ("last", made.last),
        ]
        for layer, (place, part) in enumerate(parts):
            names |= {f"{place}.{own}": stored for own, stored in weight_names(part.state_dict(), layer).items()}
        read = loading.read_tensors(checkpoint, sorted(set(names.values())), dtype)
        made.load_state_dict({own: read[stored] for own, stored in names.items()}, assign=True)
        cos, sin = (table.to(device) for table in made.first.tables)
        made.first.tables = cos, sin
        made.last.guard = made.last.guard.to(device)  # or a copy from the host would be captured
        return made.eval().to(device)

    def empty_cache(self, batch: int, length: int, device: str = "cpu") -> StaticCache:
        """Keys and values of every layer, (batch, heads, length, d)."""
        weight = self.last.lm_head.weight
        shape = (batch, self.heads, length, weight.shape[1] // self.heads)
        made = [torch.zeros(shape, dtype=weight.dtype, device=device) for _ in range(2 * len(self.middles) + 2)]
        return list(zip(made[::2], made[1::2], strict=True))

    def step(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor | None,
        cache: StaticCache, past: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """S new tokens behind `past` in the cache; the mask is that of forward, (batch, 1, S, past + S), True = hidden;
        None where all is seen.

        Returns the next token (batch, 1) and the logits (batch, vocabulary) of the last position.
        """
        batch, length = input_ids.shape
        mask = None if attention_mask is None else ~attention_mask
        used = slice(0, past + length)
        cos, sin, stream, mixed = self.first(input_ids, position_ids)
        for number, (keys, values) in enumerate(cache):
            query, key, value = (rows.transpose(1, 2) for rows in turn(mixed, cos, sin, self.heads))
            keys[:, :, past : past + length], values[:, :, past : past + length] = key, value
            seen = F.scaled_dot_product_attention(query, keys[:, :, used], values[:, :, used], attn_mask=mask)
            seen = seen.transpose(1, 2).reshape(batch, length, -1)
            if number < len(self.middles):
                stream, mixed = self.middles[number](stream, seen)
        token, logits = self.last(stream[:, -1:], seen[:, -1:])
        return token, logits
