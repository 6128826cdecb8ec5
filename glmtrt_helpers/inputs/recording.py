"""Record what `forward` is called with during a chat, and keep it in `inputs.json` for the steps after notebook 01."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core import records
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.files import replacing
from glmtrt_helpers.inputs.names import STEP_INPUTS, past_names

RECORD_NAME = "inputs.json"
Size = Annotated[int, msgspec.Meta(ge=0, le=2**31)]


@dataclass
class Call:
    """One recorded call of forward: shapes and dtypes of its tensors by name, and the values of positions and mask."""

    kind: Literal["prefill", "decode"]
    shapes: dict[str, list[Size]]
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
    flat = {name: kwargs[name] for name in STEP_INPUTS if kwargs.get(name) is not None}
    past = kwargs.get("past_key_values") or ()
    flat |= zip(past_names(len(past)), (tensor for layer in past for tensor in layer), strict=True)
    return Call(
        kind="decode" if past and past[0][0].shape[0] else "prefill",
        shapes={name: list(tensor.shape) for name, tensor in flat.items()},
        dtypes={name: str(tensor.dtype).removeprefix("torch.") for name, tensor in flat.items()},
        position_ids=flat["position_ids"].tolist() if "position_ids" in flat else [],
        attention_mask=flat["attention_mask"].int().tolist() if "attention_mask" in flat else [],
    )


def dynamic_axes(calls: Sequence[Call]) -> dict[str, list[int]]:
    """Axes whose size differed between calls, by tensor: what an export must keep dynamic."""
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
    again = f"record it again with `glmtrt inputs {path.parent}`"
    calls = records.read(path, list[Call], again)
    axes = {"input_ids": 2, "past_key_values.0.key": 4}
    for call in calls:
        if "input_ids" not in call.shapes:
            raise WorkbookError(f"{path} has a call without input_ids: {again}.")
        for name, shape in call.shapes.items():
            if len(shape) != axes.setdefault(name, len(shape)):
                raise WorkbookError(f"{path} has a call where {name} has {len(shape)} axes, not {axes[name]}: {again}.")
    return calls
