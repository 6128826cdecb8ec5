"""Notebook 01: what `forward` is called with. Record it during a real chat, or make it for any (batch, sequence, past).

Inputs are flat mappings from a tensor's name to the tensor, in the order of `input_names`, everywhere in the project;
`forward_kwargs` nests them for PyTorch. past and present are sequence first: (past, batch, heads, d).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from glmtrt_helpers import feeds
from glmtrt_helpers.checkpoints import Checkpoint
from glmtrt_helpers.errors import WorkbookError
from glmtrt_helpers.files import replacing

RECORD_NAME = "inputs.json"


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


def empty_past(checkpoint: Checkpoint, batch: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The cache before the first token: 2 * num_layers tensors (0, batch, heads, d)."""
    shape = (0, batch, checkpoint.num_heads, checkpoint.head_size)
    return {name: torch.zeros(shape, dtype=dtype) for name in input_names(checkpoint.num_layers)[3:]}


def prompt_inputs(
    checkpoint: Checkpoint, prompts: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """`feeds.prefill` as tensors, with an empty past in dtype."""
    arrays = feeds.prefill(checkpoint, prompts)
    flat = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return flat | empty_past(checkpoint, len(prompts), dtype)


def next_inputs(
    previous: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], tokens: torch.Tensor
) -> dict[str, torch.Tensor]:
    """`feeds.decode` as tensors: one more token per row, tokens (batch,) int64, and present becomes past."""
    before = {name: previous[name].numpy() for name in ("position_ids", "attention_mask")}
    flat = {name: torch.from_numpy(array) for name, array in feeds.decode(before, tokens.numpy()).items()}
    past = {name.replace("present", "past_key_values"): t for name, t in outputs.items() if name != "logits"}
    return flat | past


def example_inputs(
    checkpoint: Checkpoint,
    batch: int,
    sequence: int,
    past: int,
    dtype: torch.dtype = torch.float32,
    *,
    padding: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Seeded inputs of any shape: random ids, positions and mask as a chat would have them, a random cache.

    The whole of past + sequence is one prompt whose <sop> is the first new token where there is a past, the last token
    where there is none. padding: how many tokens at the left of each row are padding (for batches of unequal prompts).
    Raises WorkbookError for a shape the model cannot take.
    """
    total = past + sequence
    if batch < 1 or sequence < 1 or past < 0 or total > checkpoint.max_length:
        raise WorkbookError(
            f"batch {batch}, sequence {sequence}, past {past} is no input of {checkpoint.directory}: batch and "
            f"sequence are at least 1, past at least 0, past + sequence at most {checkpoint.max_length}."
        )
    generator = torch.Generator().manual_seed(seed)
    sop = max(past, 0) if past else sequence - 1
    gmask = max(sop - 1, 0)
    index = torch.arange(total)
    visible = (index[None, :] <= index[:, None]) | (index[None, :] < sop)
    mask = (~visible[past:]).repeat(batch, 1, 1, 1)
    rows = torch.stack([torch.where(index < sop, index, gmask), (index - sop + 1).clamp(min=0)])[:, past:]
    positions = rows.repeat(batch, 1, 1)
    first_piece = 6  # behind <unk>, <s>, </s>, <pad>, <n> and "▁"
    ids = torch.randint(first_piece, int(checkpoint.config["mask_token_id"]), (batch, sequence), generator=generator)
    for row, pad in enumerate(padding or ()):
        mask[row, :, :, :pad] = True
        shifted = (positions[row, 0] - pad).clamp(min=0)
        positions[row, 0] = shifted
        ids[row, : max(pad - past, 0)] = int(checkpoint.config["pad_token_id"])
    shape = (past, batch, checkpoint.num_heads, checkpoint.head_size)
    cache = {name: torch.randn(shape, generator=generator).to(dtype) for name in input_names(checkpoint.num_layers)[3:]}
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask} | cache


@dataclass
class Call:
    """One recorded call of forward: its tensors by name, what came out, and where in the chat it was."""

    kind: str  # "prefill" or "decode"
    shapes: dict[str, list[int]]
    dtypes: dict[str, str]
    position_ids: list[Any] = field(default_factory=list)
    attention_mask: list[Any] = field(default_factory=list)

    @property
    def sequence(self) -> int:
        return self.shapes["input_ids"][1]

    @property
    def past(self) -> int:
        return self.shapes.get("past_key_values.0.key", [0])[0]


@contextmanager
def record(model: torch.nn.Module) -> Iterator[list[Call]]:
    """Record every call of `model.forward` inside the block; the hook is removed at its end, also after an error."""
    calls: list[Call] = []

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(_describe(kwargs))

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _describe(kwargs: Mapping[str, Any]) -> Call:
    past = kwargs.get("past_key_values")
    flat = {
        name: kwargs[name] for name in ("input_ids", "position_ids", "attention_mask") if kwargs.get(name) is not None
    }
    for i, layer in enumerate(past or ()):
        for part, tensor in zip(("key", "value"), layer, strict=True):
            flat[f"past_key_values.{i}.{part}"] = tensor
    past_length = flat["past_key_values.0.key"].shape[0] if past else 0
    return Call(
        kind="decode" if past_length else "prefill",
        shapes={name: list(tensor.shape) for name, tensor in flat.items()},
        dtypes={name: str(tensor.dtype).removeprefix("torch.") for name, tensor in flat.items()},
        position_ids=flat["position_ids"].tolist() if "position_ids" in flat else [],
        attention_mask=flat["attention_mask"].int().tolist() if "attention_mask" in flat else [],
    )


def moving_axes(calls: Sequence[Call]) -> dict[str, list[int]]:
    """Axes whose size differed between calls, by tensor: what an export must leave dynamic."""
    names = [name for name in calls[0].shapes if all(name in call.shapes for call in calls)]
    axes = {}
    for name in names:
        sizes = [call.shapes[name] for call in calls]
        axes[name] = [axis for axis in range(len(sizes[0])) if len({size[axis] for size in sizes}) > 1]
    return axes


def save_record(checkpoint: Checkpoint, calls: Sequence[Call]) -> Path:
    """Write `inputs.json` into the working copy: shapes, dtypes, positions and masks of the recorded calls."""
    if not calls:
        raise WorkbookError("no call of forward was recorded: run a chat inside `with record(model) as calls`.")
    path = checkpoint.directory / RECORD_NAME
    with replacing(path) as temporary:
        temporary.write_text(json.dumps([asdict(call) for call in calls], ensure_ascii=False), encoding="utf-8")
    return path


def load_record(checkpoint: Checkpoint) -> list[Call]:
    """Read `inputs.json`; where it is missing the error names the notebook that makes it."""
    path = checkpoint.directory / RECORD_NAME
    if not path.exists():
        raise WorkbookError(
            f"{path} is missing: run notebook 01_debug_forward_inputs or `glmtrt inputs {path.parent}`."
        )
    return [Call(**call) for call in json.loads(path.read_text(encoding="utf-8"))]
