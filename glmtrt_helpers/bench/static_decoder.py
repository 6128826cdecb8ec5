"""What a careful PyTorch user would write: a static cache and scaled_dot_product_attention, for a CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from glmtrt_helpers.chat.sampling import GUARD_SCORE
from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.remote_code import inv_freq
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer

ALPHA = math.sqrt(2 * 28)  # of the residual: upstream's own default, which does not follow the number of layers
StaticCache = list[tuple[torch.Tensor, torch.Tensor]]


def rotary_tables(length: int, head_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin for half a head, (length, head_size / 2) each, computed in dtype as upstream computes them.

    sin carries the signs of rotate_half, so that a half x is rotated by x * cos + swapped(x) * sin.
    """
    half = head_size // 2
    angles = torch.outer(
        torch.arange(length, dtype=dtype), inv_freq(half).to(dtype)
    )  # fp16 angles: a number to match, not a bug
    return torch.cat([angles.cos()] * 2, dim=-1), torch.cat([-angles.sin(), angles.sin()], dim=-1)


def rotate(mixed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int) -> tuple[torch.Tensor, ...]:
    """mixed (batch, S, 3H) to query, key and value (batch, S, heads, d), the first two rotated.

    cos, sin: (batch, S, d).
    """
    batch, length, width = mixed.shape
    size = width // (3 * heads)
    split = mixed.view(batch, length, heads, 3, size)
    both = split[:, :, :, :2]
    first, second, third, fourth = both.split(size // 4, dim=-1)
    swapped = torch.cat([second, first, fourth, third], dim=-1)
    both = both * cos[:, :, None, None] + swapped * sin[:, :, None, None]
    return both[:, :, :, 0], both[:, :, :, 1], split[:, :, :, 2]


class Layer(nn.Module):
    """The weights of a layer, under their names in the state dict, and what is computed of each token alone."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        hidden, epsilon = config["hidden_size"], config.get("layernorm_epsilon", 1e-5)
        inner = config.get("inner_hidden_size") or 4 * hidden
        linear = {"query_key_value": nn.Linear(hidden, 3 * hidden), "dense": nn.Linear(hidden, hidden)}
        self.input_layernorm, self.post_attention_layernorm = (nn.LayerNorm(hidden, eps=epsilon) for _ in range(2))
        self.attention = nn.ModuleDict(linear)
        self.mlp = nn.ModuleDict({"dense_h_to_4h": nn.Linear(hidden, inner), "dense_4h_to_h": nn.Linear(inner, hidden)})

    def before(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden (batch, S, H) to the residual (batch, S, H), and query, key and value in one (batch, S, 3H)."""
        residual = self.input_layernorm(hidden)
        return residual, self.attention["query_key_value"](residual)

    def after(self, residual: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """The residual and the attention's result, (batch, S, H) each, to the layer's output.

        A residual is a LayerNorm's output times alpha, not its input.
        """
        x = self.post_attention_layernorm(ALPHA * residual + self.attention["dense"](seen))
        inner = F.gelu(self.mlp["dense_h_to_4h"](x), approximate="tanh")
        return ALPHA * x + self.mlp["dense_4h_to_h"](inner)


class StaticDecoder(nn.Module):
    """The layers in a row, and a cache that is written in place.

    blank_id: the token that is taken where a score is no number, as `sampling.guard` does on the host.
    """

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, blank_id: int):
        super().__init__()
        hidden, self.heads = config["hidden_size"], config["num_attention_heads"]
        self.transformer = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config["vocab_size"], hidden),
                "layers": nn.ModuleList(Layer(config) for _ in range(config["num_layers"])),
                "final_layernorm": nn.LayerNorm(hidden, eps=config.get("layernorm_epsilon", 1e-5)),
            }
        )
        self.lm_head = nn.Linear(hidden, config["vocab_size"], bias=False)
        self.to(dtype)
        with torch.device("cpu"):  # real numbers, also where the weights have none
            self.tables = rotary_tables(config["max_sequence_length"], hidden // self.heads, dtype)
            self.guard = torch.zeros(config["vocab_size"], dtype=dtype)
        self.guard[blank_id] = GUARD_SCORE

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: str = "cpu") -> StaticDecoder:
        """With the checkpoint's weights; on the CPU and in their own dtype they stay mapped."""
        with torch.device("meta"):
            made = cls(checkpoint.config, dtype, load_tokenizer(checkpoint).blank_id)
        read = loading.read_tensors(checkpoint, sorted(made.state_dict()), dtype)
        made.load_state_dict(read, assign=True)
        cos, sin = (table.to(device) for table in made.tables)
        made.tables, made.guard = (cos, sin), made.guard.to(device)  # or copies from the host would be captured
        return made.eval().to(device)

    def empty_cache(self, batch: int, length: int, device: str = "cpu") -> StaticCache:
        """Keys and values of every layer, (batch, heads, length, d)."""
        weight = self.lm_head.weight
        shape = (batch, self.heads, length, weight.shape[1] // self.heads)
        layers: Any = self.transformer["layers"]
        made = [torch.zeros(shape, dtype=weight.dtype, device=device) for _ in range(2 * len(layers))]
        return list(zip(made[::2], made[1::2], strict=True))

    def step(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor | None,
        cache: StaticCache, past: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """S new tokens after `past` in the cache; the mask is that of forward, (batch, 1, S, past + S), True = hidden;
        None where all is seen.

        Returns the next token (batch, 1) and the logits (batch, vocabulary) of the last position.
        """
        batch, length = input_ids.shape
        mask = None if attention_mask is None else ~attention_mask
        used = slice(0, past + length)
        cos, sin = (
            torch.cat([F.embedding(position_ids[:, row], table) for row in (0, 1)], dim=-1) for table in self.tables
        )
        hidden = self.transformer["word_embeddings"](input_ids)
        layers: Any = self.transformer["layers"]
        for number, (layer, (keys, values)) in enumerate(zip(layers, cache, strict=True)):
            residual, mixed = layer.before(hidden)
            query, key, value = (rows.transpose(1, 2) for rows in rotate(mixed, cos, sin, self.heads))
            keys[:, :, past : past + length], values[:, :, past : past + length] = key, value
            seen = F.scaled_dot_product_attention(query, keys[:, :, used], values[:, :, used], attn_mask=mask)
            seen = seen.transpose(1, 2).reshape(batch, length, -1)
            if number + 1 == len(layers):  # nobody reads the scores of the other tokens
                residual, seen = residual[:, -1:], seen[:, -1:]
            hidden = layer.after(residual, seen)
        logits = self.lm_head(self.transformer["final_layernorm"](hidden[:, 0]))
        is_finite = (logits.float() * 0).sum() == 0
        logits = torch.where(is_finite, logits, self.guard)
        return logits.argmax(dim=-1, keepdim=True), logits
