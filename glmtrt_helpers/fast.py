"""A second decoder over the same weights, written for the engine that one would really run.

It computes what the checkpoint's own code computes, and differs in what it hands over:

- The cache lies in chunks of 128 tokens, (chunks, batch, heads, 128, d). The chunks in use are the start of the buffer,
  so they are read where they lie, without a slice or a copy, and each chunk of each head is a product of its own, which
  gives a GPU enough of them to do at once. Only the rows of the new tokens come out; the session puts them in place.
- The two rotary embeddings of a head are one: a table of cos and sin over all of d, picked by both positions.
- Past the attention of the last layer only the last token goes on, for nobody reads the scores of the others.
- The next token and the best candidates are chosen in the graph, and what else the next step needs comes out of it: a
  step can follow a step without the host, which reads a token only to print it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from glmtrt_helpers import checkpoints, export
from glmtrt_helpers.checkpoints import Checkpoint
from glmtrt_helpers.errors import WorkbookError
from glmtrt_helpers.export import DTYPES, ExportReport
from glmtrt_helpers.fast_session import STEP_INPUTS
from glmtrt_helpers.profiles import CHUNK
from glmtrt_helpers.sampling import GUARD_SCORE
from glmtrt_helpers.standin.build import inv_freq

CANDIDATES = 64
CHOICES = ("next_token", "next_position_ids", "next_visible", "candidate_ids", "candidate_scores", "logits")
HIDDEN = -10000.0  # what upstream puts for a score that is masked

Cache = Sequence[tuple[torch.Tensor, torch.Tensor]]


def cache_names(num_layers: int) -> list[str]:
    """The cache as it goes in: cache.0.key, cache.0.value, cache.1.key, ..."""
    return [f"cache.{layer}.{part}" for layer in range(num_layers) for part in ("key", "value")]


def new_names(num_layers: int) -> list[str]:
    """The rows of the new tokens as they come out: new.0.key, new.0.value, new.1.key, ..."""
    return [name.replace("cache.", "new.") for name in cache_names(num_layers)]


def rotary_tables(length: int, head_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin for half a head, (length, head_size / 2) each, computed in dtype as upstream computes them.

    sin carries the signs of rotate_half, so that a half x is turned by x * cos + swapped(x) * sin.
    """
    half = head_size // 2
    angles = torch.outer(
        torch.arange(length, dtype=dtype), inv_freq(half).to(dtype)
    )  # fp16 angles: a number to match, not a bug
    return torch.cat([angles.cos()] * 2, dim=-1), torch.cat([-angles.sin(), angles.sin()], dim=-1)


class Attention(nn.Module):
    """Attention over a chunked cache and the new tokens. last: only the last token's result is wanted."""

    def __init__(self, config: Mapping[str, Any], layer: int):
        super().__init__()
        hidden, self.heads = config["hidden_size"], config["num_attention_heads"]
        self.layer, self.last = layer, layer == config["num_layers"] - 1
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.dense = nn.Linear(hidden, hidden)

    def project(self, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> Sequence[torch.Tensor]:
        """Query and key, both turned, and value, (batch, heads, S, d) each."""
        batch, length, hidden = x.shape
        size = hidden // self.heads
        mixed = self.query_key_value(x).view(batch, length, self.heads, 3, size)
        turned = mixed[:, :, :, :2]
        first, second, third, fourth = turned.split(size // 4, dim=-1)
        turned = turned * turn[0] + torch.cat([second, first, fourth, third], dim=-1) * turn[1]
        return [part.transpose(1, 2) for part in (turned[:, :, :, 0], turned[:, :, :, 1], mixed[:, :, :, 2])]

    def forward(
        self, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor], masks: tuple[torch.Tensor, torch.Tensor],
        past: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """x (batch, S, H); turn: cos and sin (batch, S, 1, 1, d); past: keys and values (chunks, batch, heads, 128, d).

        masks, True = hidden: (chunks, batch, 1, 1, 128) over the cache, (batch, 1, S or 1, S) among the new tokens.
        Returns the attention (batch, S or 1, H), and the new keys and values (batch, heads, S, d).
        """
        batch, _, hidden = x.shape
        size = hidden // self.heads
        query, key, value = self.project(x, turn)
        if self.last:
            query = query[:, :, -1:]
        query = query / (math.sqrt(size) * (self.layer + 1))  # the layer's number keeps fp16 scores from overflowing
        keys, values = past
        over_cache = (query @ keys.transpose(-1, -2)).masked_fill(masks[0], HIDDEN)
        over_new = (query @ key.transpose(-1, -2)).masked_fill(masks[1], HIDDEN)
        chunks, rows = keys.shape[0], query.shape[2]
        over_cache = over_cache.permute(1, 2, 3, 0, 4).reshape(batch, self.heads, rows, chunks * CHUNK)
        scores = torch.cat([over_cache, over_new], dim=-1).float() * (self.layer + 1)
        shares = scores.softmax(dim=-1).to(x.dtype)
        of_cache = shares[..., : chunks * CHUNK].reshape(batch, self.heads, rows, chunks, CHUNK).permute(3, 0, 1, 2, 4)
        seen = (of_cache @ values).float().sum(dim=0) + (shares[..., chunks * CHUNK :] @ value).float()
        return self.dense(seen.to(x.dtype).transpose(1, 2).reshape(batch, rows, hidden)), key, value


class MLP(nn.Module):
    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        hidden = config["hidden_size"]
        inner = config.get("inner_hidden_size") or 4 * hidden
        self.dense_h_to_4h = nn.Linear(hidden, inner)
        self.dense_4h_to_h = nn.Linear(inner, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dense_h_to_4h(x)
        return self.dense_4h_to_h(F.gelu(x, approximate="tanh"))


class Block(nn.Module):
    """One layer. What goes round it is the LayerNorm's output times alpha, not the layer's input."""

    alpha = math.sqrt(2 * 28)  # upstream's own default: it does not follow the number of layers

    def __init__(self, config: Mapping[str, Any], layer: int):
        super().__init__()
        hidden, eps = config["hidden_size"], config.get("layernorm_epsilon", 1e-5)
        self.input_layernorm = nn.LayerNorm(hidden, eps=eps)
        self.attention = Attention(config, layer)
        self.post_attention_layernorm = nn.LayerNorm(hidden, eps=eps)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = self.input_layernorm(x)
        attention, key, value = self.attention(x, *rest)
        x = self.post_attention_layernorm(self.alpha * x[:, -attention.shape[1] :] + attention)
        return self.alpha * x + self.mlp(x), key, value


class Transformer(nn.Module):
    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        hidden = config["hidden_size"]
        self.word_embeddings = nn.Embedding(config["vocab_size"], hidden)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config["num_layers"]))
        self.final_layernorm = nn.LayerNorm(hidden, eps=config.get("layernorm_epsilon", 1e-5))


class FastDecoder(nn.Module):
    """The whole decoder; its parameters have the names of the state dict.

    blank_id: the token that is taken where a score of the batch is no number, as `sampling.guard` does on the host.
    """

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, blank_id: int):
        super().__init__()
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        self.to(dtype)
        size = config["hidden_size"] // config["num_attention_heads"]
        with torch.device("cpu"):  # real numbers, also where the weights have none
            self.tables = rotary_tables(config["max_sequence_length"], size, dtype)
            self.guard = torch.zeros(config["vocab_size"], dtype=dtype)
            self.slots = torch.arange(-(-config["max_sequence_length"] // CHUNK) * CHUNK).view(-1, 1, 1, 1, CHUNK)
        self.guard[blank_id] = GUARD_SCORE

    def turn(self, position_ids: torch.Tensor) -> Sequence[torch.Tensor]:
        """cos and sin of both positions, (batch, S, 1, 1, d) each."""
        picked = ([F.embedding(position_ids[:, row], table) for row in (0, 1)] for table in self.tables)
        return [torch.cat(halves, dim=-1)[:, :, None, None] for halves in picked]

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor,
        visible: torch.Tensor, cache: Cache,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """One prefill or decode step of S new tokens on a cache of some chunks.

        input_ids (batch, S) and position_ids (batch, 2, S), int64; attention_mask (batch, 1, S, S) among the new
        tokens, bool, True = hidden; visible (batch, 2), int64: the tokens of the cache that may be seen, from the first
        to the one behind the last; cache: for every layer keys and values (chunks, batch, heads, 128, d), finite also
        where they are hidden.
        Returns next_token (batch, 1), next_position_ids (batch, 2, 1) and next_visible (batch, 2) for the step that
        follows, candidate_ids and candidate_scores (batch, 64), logits (batch, vocabulary) of the last position, and
        for every layer the new keys and values (batch, heads, S, d).
        """
        cos, sin = self.turn(position_ids)
        slots = self.slots[: cache[0][0].shape[0]]
        first, end = (visible[:, number, None, None, None] for number in (0, 1))
        over_cache = (slots < first) | (slots >= end)
        hidden = self.transformer.word_embeddings(input_ids)
        new: list[torch.Tensor] = []
        for number, layer in enumerate(self.transformer.layers, 1):
            last = number == len(self.transformer.layers)
            among_new = attention_mask[:, :, -1:] if last else attention_mask
            hidden, key, value = layer(hidden, (cos, sin), (over_cache, among_new), cache[number - 1])
            new += [key, value]
        logits = self.lm_head(self.transformer.final_layernorm(hidden[:, -1]))
        is_finite = (logits.float() * 0).sum() == 0
        logits = torch.where(is_finite, logits, self.guard)
        scores, ids = logits.float().topk(min(CANDIDATES, logits.shape[-1]))
        next_positions = torch.cat([position_ids[:, :1, -1:], position_ids[:, 1:, -1:] + 1], dim=1)
        next_visible = torch.stack([visible[:, 0], visible[:, 1] + input_ids.shape[1]], dim=1)
        return logits.argmax(dim=-1, keepdim=True), next_positions, next_visible, ids, scores, logits, *new


def example_inputs(
    config: Mapping[str, Any], batch: int, length: int, chunks: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments of forward with these sizes; the cache is empty, as all of it is hidden."""
    heads = config["num_attention_heads"]
    shape = (chunks, batch, heads, CHUNK, config["hidden_size"] // heads)
    return {
        "input_ids": torch.full((batch, length), config["bos_token_id"]),
        "position_ids": torch.zeros(batch, 2, length, dtype=torch.long),
        "attention_mask": torch.ones(batch, 1, length, length).triu(1).bool(),
        "visible": torch.zeros(batch, 2, dtype=torch.long),
        # Tensors of their own, or the exporter takes them for one input.
        "cache": [
            (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(config["num_layers"])
        ],
    }


def load_decoder(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, kind: type[FastDecoder] = FastDecoder
) -> FastDecoder:
    """A decoder with the checkpoint's weights, for PyTorch; in their own dtype they stay mapped."""
    with torch.device("meta"):
        model = kind(checkpoint.config, dtype, checkpoints.load_tokenizer(checkpoint).blank_id)
    model.load_state_dict(checkpoints.read_tensors(checkpoint, list(model.state_dict()), dtype), assign=True)
    return model.eval()


def export_fast(
    checkpoint: Checkpoint, dtype: str = "fp16", *, progress: Callable[[str], None] = lambda phase: None
) -> ExportReport:
    """Write `model.DTYPE.fast.onnx` beside the shards, its weights read in place, and return what was written."""
    if dtype not in DTYPES:
        raise WorkbookError(f"dtype {dtype!r} is not exported: choose fp16 or fp32.")
    checkpoint = export.in_place(checkpoint, progress)
    blank_id = checkpoints.load_tokenizer(checkpoint).blank_id

    def trace() -> ir.Model:
        with torch.device("meta"):
            model = FastDecoder(checkpoint.config, DTYPES[dtype], blank_id).eval()
        with FakeTensorMode(allow_non_fake_inputs=True):
            weights = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
        model.load_state_dict(weights, assign=True)
        axes = torch.export.Dim
        batch, sequence, chunks = axes("batch"), axes("sequence"), axes("chunks")
        layer = ({0: chunks, 1: batch}, {0: chunks, 1: batch})
        program = torch.onnx.export(
            model,
            kwargs=example_inputs(checkpoint.config, 2, 5, 3, DTYPES[dtype]),
            dynamo=True,
            optimize=False,
            opset_version=export.DEFAULT_OPSET,
            input_names=[*STEP_INPUTS, *cache_names(checkpoint.num_layers)],
            output_names=[*CHOICES, *new_names(checkpoint.num_layers)],
            dynamic_shapes={
                "input_ids": {0: batch, 1: sequence},
                "position_ids": {0: batch, 2: sequence},
                "attention_mask": {0: batch, 2: sequence, 3: sequence},
                "visible": {0: batch},
                "cache": [layer] * checkpoint.num_layers,
            },
            verbose=False,
        )
        assert program is not None
        return program.model

    return export.write_traced(
        checkpoint, dtype, export.onnx_path(checkpoint, dtype, fast=True), trace, progress=progress
    )
