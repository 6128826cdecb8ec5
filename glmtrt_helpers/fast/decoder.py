"""A second decoder over the same weights, cut into the parts that the fast engine is made of.

- The weights are inputs of the graphs, not part of them. A graph of one layer is built once, in a second, and run for
  every layer with other addresses; a plan takes megabytes, and the shards go to the GPU as they are.
- The cut is at the attention: `first` embeds the tokens and makes the product that holds query, key and value of the
  first layer; `middle` goes from one layer's attention to the next one's product; `last` goes on to the next token.
  Attention of a prompt is a graph of its own; that of a single token is left to a kernel (`kernels`) that reads the
  cache in its place and writes the new row into it, so nothing of the cache is ever copied.
- No part has a mask. A prompt is taken without its padding, and without <sop>, the first token that sees only what came
  before it: all the others see one another.
- The two rotary embeddings of a head are one: a table of cos and sin over all of d, picked by both positions.
- Behind the last attention only the last token goes on, for nobody reads the scores of the others; the next token is
  chosen in the graph. (The best 64, for sampling, took TensorRT 0.4 ms; all scores come to the host in a tenth of it.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from glmtrt_helpers.chat.sampling import GUARD_SCORE
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.loading import DTYPES
from glmtrt_helpers.checkpoints.remote_code import inv_freq
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines.builder import BuildOptions, BuildReport, Progress, build_engine
from glmtrt_helpers.engines.profiles import Profile, Range, chat_profiles
from glmtrt_helpers.export import exporting, graph_passes, weights_in_shards
from glmtrt_helpers.export.exporting import ExportReport
from glmtrt_helpers.fast.session import PARTS, input_dims, part_path

ATTENTION_OPSET = 23  # the first with an operator for attention
EXAMPLE = {"batch": 2, "sequence": 5}  # what is traced
FIXED = {"attention": {"batch": 1}, "last": {"sequence": 1}}  # dimensions that do not move
Tensors = tuple[torch.Tensor, ...]


def rotary_tables(length: int, head_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin for half a head, (length, head_size / 2) each, computed in dtype as upstream computes them.

    sin carries the signs of rotate_half, so that a half x is turned by x * cos + swapped(x) * sin.
    """
    half = head_size // 2
    angles = torch.outer(
        torch.arange(length, dtype=dtype), inv_freq(half).to(dtype)
    )  # fp16 angles: a number to match, not a bug
    return torch.cat([angles.cos()] * 2, dim=-1), torch.cat([-angles.sin(), angles.sin()], dim=-1)


class Enter(nn.Module):
    """Into a layer: its first LayerNorm, and the product that makes query, key and value.

    biased: with the bias of that product, which is otherwise left to whoever turns query and key.
    """

    def __init__(self, config: Mapping[str, Any], biased: bool):
        super().__init__()
        hidden = config["hidden_size"]
        self.input_layernorm = nn.LayerNorm(hidden, eps=config.get("layernorm_epsilon", 1e-5))
        self.attention = nn.ModuleDict({"query_key_value": nn.Linear(hidden, 3 * hidden, bias=biased)})

    def forward(self, hidden: torch.Tensor) -> Tensors:
        """hidden (batch, S, H). Returns what goes round the attention (batch, S, H), and the product (batch, S, 3H)."""
        stream = self.input_layernorm(hidden)
        return stream, self.attention["query_key_value"](stream)


def turn(mixed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int) -> Tensors:
    """mixed (batch, S, 3H), with its bias, to query, key and value (batch, S, heads, d), the first two turned.

    cos, sin: (batch, S, d).
    """
    batch, length, width = mixed.shape
    size = width // (3 * heads)
    split = mixed.view(batch, length, heads, 3, size)
    turned = split[:, :, :, :2]
    first, second, third, fourth = turned.split(size // 4, dim=-1)
    swapped = torch.cat([second, first, fourth, third], dim=-1)
    turned = turned * cos[:, :, None, None] + swapped * sin[:, :, None, None]
    return turned[:, :, :, 0], turned[:, :, :, 1], split[:, :, :, 2]


class Leave(nn.Module):
    """Out of a layer's attention: dense, the second LayerNorm, the MLP.

    What goes round each of them is the LayerNorm's output times alpha, not its input.
    """

    alpha = math.sqrt(2 * 28)  # upstream's own default: it does not follow the number of layers

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        hidden = config["hidden_size"]
        inner = config.get("inner_hidden_size") or 4 * hidden
        self.attention = nn.ModuleDict({"dense": nn.Linear(hidden, hidden)})
        self.post_attention_layernorm = nn.LayerNorm(hidden, eps=config.get("layernorm_epsilon", 1e-5))
        self.mlp = nn.ModuleDict({"dense_h_to_4h": nn.Linear(hidden, inner), "dense_4h_to_h": nn.Linear(inner, hidden)})

    def forward(self, stream: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """stream and the attention's result, (batch, S, H) each, to the layer's output."""
        x = self.post_attention_layernorm(self.alpha * stream + self.attention["dense"](seen))
        inner = F.gelu(self.mlp["dense_h_to_4h"](x), approximate="tanh")
        return self.alpha * x + self.mlp["dense_4h_to_h"](inner)


class First(nn.Module):
    """input_ids (batch, S), position_ids (batch, 2, S) to cos, sin (batch, S, d), stream (batch, S, H), mixed."""

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, biased: bool = False):
        super().__init__()
        self.transformer = nn.ModuleDict({"word_embeddings": nn.Embedding(config["vocab_size"], config["hidden_size"])})
        self.enter = Enter(config, biased)
        self.to(dtype)
        with torch.device("cpu"):  # real numbers, also where the weights have none
            size = config["hidden_size"] // config["num_attention_heads"]
            self.tables = rotary_tables(config["max_sequence_length"], size, dtype)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Tensors:
        cos, sin = (
            torch.cat([F.embedding(position_ids[:, row], table) for row in (0, 1)], dim=-1) for table in self.tables
        )
        hidden = self.transformer["word_embeddings"](input_ids)
        return cos, sin, *self.enter(hidden)


class Middle(nn.Module):
    """stream and seen of one layer to stream and mixed of the next."""

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, biased: bool = False):
        super().__init__()
        self.leave, self.enter = Leave(config), Enter(config, biased)
        self.to(dtype)

    def forward(self, stream: torch.Tensor, seen: torch.Tensor) -> Tensors:
        outputs: Tensors = self.enter(self.leave(stream, seen))
        return outputs


class Last(nn.Module):
    """stream, seen of the last token, (batch, 1, H), to next_token (batch, 1) and logits (batch, vocabulary).

    blank_id: the token that is taken where a score of the batch is no number, as `sampling.guard` does on the host.
    """

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, blank_id: int):
        super().__init__()
        hidden = config["hidden_size"]
        self.leave = Leave(config)
        self.transformer = nn.ModuleDict(
            {"final_layernorm": nn.LayerNorm(hidden, eps=config.get("layernorm_epsilon", 1e-5))}
        )
        self.lm_head = nn.Linear(hidden, config["vocab_size"], bias=False)
        self.to(dtype)
        with torch.device("cpu"):
            self.guard = torch.zeros(config["vocab_size"], dtype=dtype)
        self.guard[blank_id] = GUARD_SCORE

    def forward(self, stream: torch.Tensor, seen: torch.Tensor) -> Tensors:
        hidden = self.leave(stream, seen)
        logits = self.lm_head(self.transformer["final_layernorm"](hidden[:, 0]))
        is_finite = (logits.float() * 0).sum() == 0
        logits = torch.where(is_finite, logits, self.guard.to(logits.device))
        return logits.argmax(dim=-1, keepdim=True), logits


class PromptAttention(nn.Module):
    """mixed (1, S, 3H), cos and sin (1, S, d), of tokens that all see one another, to seen (1, S, H) and to the rows
    of the cache, key and value (1, S, heads, d).

    In fp16 it is one operator, for which TensorRT-RTX has kernels in fp16 only; else written out, with scores in fp32.
    """

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype):
        super().__init__()
        self.heads = config["num_attention_heads"]
        bias = nn.ParameterDict({"bias": torch.zeros(3 * config["hidden_size"])})
        self.enter = nn.ModuleDict({"attention": nn.ModuleDict({"query_key_value": bias})})
        self.fused = dtype == torch.float16
        self.to(dtype)

    def forward(self, mixed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Tensors:
        bias: Any = self.enter["attention"]
        query, key, value = turn(mixed + bias["query_key_value"]["bias"], cos, sin, self.heads)
        q, k, v = (rows.transpose(1, 2) for rows in (query, key, value))
        if self.fused:
            seen = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
            seen = scores.softmax(dim=-1).to(v.dtype) @ v
        return seen.transpose(1, 2).reshape(*mixed.shape[:2], -1), key, value


TAKES = {
    "first": ("input_ids", "position_ids"),
    "middle": ("stream", "seen"),
    "last": ("stream", "seen"),
    "attention": ("mixed", "cos", "sin"),
}  # beside its weights
GIVES = {
    "first": ("cos", "sin", "stream", "mixed"),
    "middle": ("next_stream", "mixed"),
    "last": ("next_token", "logits"),
    "attention": ("seen", "key", "value"),
}


def make_part(part: str, config: Mapping[str, Any], dtype: torch.dtype, blank_id: int) -> nn.Module:
    """One of PARTS, on the device that is in force."""
    kinds: dict[str, Callable[[], nn.Module]] = {
        "first": lambda: First(config, dtype),
        "middle": lambda: Middle(config, dtype),
        "last": lambda: Last(config, dtype, blank_id),
        "attention": lambda: PromptAttention(config, dtype),
    }
    return kinds[part]().eval()


def export_fast(
    checkpoint: Checkpoint, dtype: str = "fp16", *, progress: Callable[[str], None] = lambda phase: None
) -> list[ExportReport]:
    """Write `model.DTYPE.fast.PART.onnx` beside the shards, for each part, and return what was written."""
    if dtype not in DTYPES:
        raise WorkbookError(f"dtype {dtype!r} is not exported: choose fp16 or fp32.")
    checkpoint = exporting.with_linkable_shards(checkpoint, progress)
    blank_id = load_tokenizer(checkpoint).blank_id
    return [_export_part(checkpoint, dtype, part, blank_id, progress) for part in PARTS]


def _export_part(
    checkpoint: Checkpoint, dtype: str, part: str, blank_id: int, progress: Callable[[str], None]
) -> ExportReport:
    started = time.perf_counter()
    with torch.device("meta"):
        model = make_part(part, checkpoint.config, DTYPES[dtype], blank_id)
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    fixed, all_dims = FIXED.get(part, {}), input_dims(checkpoint.config)
    axes = {dim: torch.export.Dim(dim) for dim in EXAMPLE if dim not in fixed}
    kwargs, moving = {}, {}
    for name in TAKES[part]:
        sizes = [dim if isinstance(dim, int) else fixed.get(dim, EXAMPLE[dim]) for dim in all_dims[name]]
        kwargs[name] = torch.zeros(sizes, dtype=torch.long if name.endswith("_ids") else DTYPES[dtype])
        moving[name] = {axis: axes[dim] for axis, dim in enumerate(all_dims[name]) if dim in axes}

    path = part_path(checkpoint, dtype, part)
    progress(f"tracing {path.stem} with dynamo")
    with exporting.quiet():
        program = torch.onnx.export(
            model,
            kwargs=kwargs,
            dynamo=True,
            optimize=False,
            opset_version=ATTENTION_OPSET if part == "attention" else exporting.DEFAULT_OPSET,
            input_names=list(TAKES[part]),
            output_names=list(GIVES[part]),
            dynamic_shapes=moving,
            verbose=False,
        )
        assert program is not None
        graph_passes.simplify(program.model, checkpoint, weights)
    graph_passes.name_dimensions(program.model)
    weights_in_shards.make_inputs(program.model, weights)
    return exporting.write_graph(program.model, checkpoint, path, "dynamo", started)


def profiles_of(part: str, profiles: Sequence[Profile]) -> list[Profile]:
    """What a part meets in those profiles: `attention` one prompt at a time, `last` one token of each row."""
    one = Range(1, 1, 1)
    if part == "attention":
        return [replace(profile, batch=one) for profile in profiles if 0 in profile.past]
    if part != "last":
        return list(profiles)
    batch, past = (
        Range(min(box.min for box in boxes), boxes[-1].opt, max(box.max for box in boxes))
        for boxes in ([profile.batch for profile in profiles], [profile.past for profile in profiles])
    )
    return [Profile("last token", batch, one, past)]


def build_fast(
    checkpoint: Checkpoint,
    dtype: str = "fp16",
    profiles: Sequence[Profile] | None = None,
    *,
    options: BuildOptions | None = None,
    package: str | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> list[BuildReport]:
    """Build `model.DTYPE.fast.PART.plan` of each part; returns what was built. profiles: `chat_profiles` by default."""
    profiles = list(profiles or chat_profiles(checkpoint))
    return [
        build_engine(
            checkpoint,
            dtype,
            profiles_of(part, profiles),
            options=options,
            package=package,
            onnx_path=part_path(checkpoint, dtype, part),
            progress=progress,
        )
        for part in PARTS
    ]
