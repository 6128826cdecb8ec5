"""What a graph is compared with: the cases, their inputs, and the outputs that PyTorch computes for them.

The reference is the unpatched source in fp32, with the checkpoint's fp16 weights. The error of an fp16 graph is
measured against it and compared with the error of PyTorch's own fp16 (`tolerances`).

The rotary angles of an fp16 model are not rounding noise: after position 512 they are off by up to a quarter radian,
and every backend must be off by the same. So the fp32 reference of an fp16 graph computes its angles in fp16, as the
model does, and only the rounding noise of the arithmetic is left between the two.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.loading import DTYPES
from glmtrt_helpers.graphs.tolerances import largest_error
from glmtrt_helpers.inputs.examples import example_inputs
from glmtrt_helpers.inputs.names import past_from
from glmtrt_helpers.sessions.base import Session
from glmtrt_helpers.sessions.pytorch import TorchSession


@dataclass(frozen=True)
class Case:
    """A shape to compare at: rows, new tokens and tokens in the cache.

    padding: number of padding tokens at the left of each row, counted from the start of the past; none by default.
    at_end: shift the positions so that the largest is the model's last one, max_length - 1.
    """

    name: str
    batch: int
    sequence: int
    past: int
    padding: tuple[int, ...] = ()
    at_end: bool = False


# (2, 5, 3), the example that the export traces, is not among them.
CASES = (
    Case("one token, no past", 1, 1, 0),
    Case("prompt", 1, 17, 0),
    Case("decode", 1, 1, 9),
    Case("decode after 600", 1, 1, 600),
    Case("chunk on a past", 1, 6, 4),
    Case("batch of 4 prompts", 4, 7, 0),
    Case("batch of 4, decode", 4, 1, 12),
    Case("left-padded prompts", 3, 8, 0, padding=(0, 3, 5)),
    Case("left-padded decode", 2, 1, 11, padding=(0, 4)),
    Case("last positions", 2, 4, 2, at_end=True),
)
# Mask, padding and batch in one case, for comparisons that run only one.
LAYER_CASE = CASES[7]


def fit(case: Case, max_length: int) -> tuple[Case | None, str]:
    """The case, with a shorter past if the model has too few positions, or None if that is not enough; and why."""
    if case.past + case.sequence <= max_length:
        return case, ""
    past = max_length - case.sequence
    if past < 1 or past <= max(case.padding, default=0):
        return None, f"the model has {max_length} positions"
    return replace(case, past=past), f"past {case.past} cut to {past}: the model has {max_length} positions"


@dataclass(frozen=True)
class Point:
    """A tensor between two modules, in PyTorch and in the graph.

    layer: None outside the layers. part: its name within the layer. module: path of a PyTorch module.
    side: "in" or "out" is the module's input or output, "softmax" the softmax in it. tensor: its name in the graph.
    """

    layer: int | None
    part: str
    module: str
    side: str
    tensor: str

    @property
    def name(self) -> str:
        return self.part if self.layer is None else f"layer {self.layer} {self.part}"


@dataclass(frozen=True)
class Reference:
    """A case with its inputs and the outputs expected for them, by tensor name.

    flat: inputs in the dtype of the graph. expected: outputs in fp32, those at the points included.
    own_errors: largest error of PyTorch's own fp16 in each output; empty for an fp32 graph.
    """

    case: Case
    flat: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]
    own_errors: dict[str, float]


def references(
    checkpoint: Checkpoint,
    dtype: str,
    cases: Sequence[Case],
    points: Sequence[Point] = (),
    progress: Callable[[str], None] = lambda phase: None,
) -> list[Reference]:
    """Inputs in dtype and fp32 outputs of every case, those at `points` included.

    One model is in memory at a time: in fp16 its weights stay mapped from the shards, in fp32 a large one is streamed
    layer by layer.
    """
    session = source_session(checkpoint, torch.float32, rotary=DTYPES[dtype], points=points)
    ready = []
    for case in cases:
        progress(f"PyTorch fp32: {case.name}")
        flat = case_inputs(checkpoint, case, session, DTYPES[dtype])
        ready.append(Reference(case, flat, run_tensors(session, _cast(flat, torch.float32)), {}))
    if dtype == "fp32":
        return ready
    del session
    gc.collect()  # modules refer to each other in cycles, and 27 GB should not wait for a collection
    session = source_session(checkpoint, torch.float16, rotary=torch.float16, points=points)
    progress("PyTorch fp16")
    return [replace(one, own_errors=_own_errors(one, run_tensors(session, one.flat))) for one in ready]


def run_tensors(session: Session, flat: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One call of forward; the outputs are tensors that share the session's memory."""
    return {name: torch.as_tensor(array) for name, array in session.run(flat).items()}


def _own_errors(one: Reference, actual: Mapping[str, torch.Tensor]) -> dict[str, float]:
    return {name: largest_error(name, one.flat, expected, actual[name])[0] for name, expected in one.expected.items()}


class _TracedSession(TorchSession):
    """PyTorch with the tensors at the points among its outputs."""

    def __init__(self, model: torch.nn.Module, points: Sequence[Point]):
        super().__init__(model)
        self.points = points

    def run(self, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
        traced: dict[str, torch.Tensor] = {}
        at_modules = [point for point in self.points if point.side != "softmax"]
        handles = [_hook(self.model.get_submodule(point.module), point, traced) for point in at_modules]
        try:
            with _SoftmaxOutputs() as softmaxes:
                outputs = super().run(flat)
            in_modules = [point for point in self.points if point.side == "softmax"]
            found = zip(in_modules, softmaxes.outputs, strict=bool(in_modules))
            traced |= {point.tensor: output for point, output in found}
            return outputs | {name: tensor.cpu().numpy() for name, tensor in traced.items()}
        finally:
            for handle in handles:
                handle.remove()


class _SoftmaxOutputs(TorchFunctionMode):
    """Keeps the output of every softmax, in order; the attention calls a function, so there is no module to hook."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "softmax":
            self.outputs.append(output)
        return output


def _hook(module: torch.nn.Module, point: Point, traced: dict[str, torch.Tensor]) -> RemovableHandle:
    def before(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
        traced[point.tensor] = args[0]

    def after(_: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        traced[point.tensor] = output[0] if isinstance(output, tuple) else output

    return module.register_forward_pre_hook(before) if point.side == "in" else module.register_forward_hook(after)


def source_session(
    checkpoint: Checkpoint, dtype: torch.dtype, rotary: torch.dtype, points: Sequence[Point]
) -> _TracedSession:
    """The unpatched source in dtype, with its rotary tables computed in the dtype `rotary`."""
    model = loading.load_bounded(checkpoint, dtype, code=checkpoint.pristine_code)
    for module in model.modules():
        # The source computes positions, angles and tables in inv_freq's dtype.
        if isinstance(getattr(module, "inv_freq", None), torch.Tensor):
            module.inv_freq = module.inv_freq.to(rotary)
    return _TracedSession(model, points)


def _cast(flat: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in flat.items()}


def case_inputs(checkpoint: Checkpoint, case: Case, reference: Session, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Flat inputs of a case, its cache computed by the reference over a prompt of `past` tokens and rounded to dtype.

    The prompt ends before <sop>, so all of it sees all of itself; <sop> is the first of the new tokens.
    """
    flat = example_inputs(checkpoint, case.batch, case.sequence, case.past, dtype, padding=case.padding)
    shift = checkpoint.max_length - 1 - flat["position_ids"].amax(dim=(0, 2)) if case.at_end else torch.zeros(2).long()
    flat["position_ids"] += shift[:, None]
    if not case.past:
        return flat
    prefix = example_inputs(
        checkpoint, case.batch, case.past, 0, torch.float32, padding=case.padding, sop=case.past, seed=1
    )
    prefix["position_ids"] += shift[:, None]
    return flat | _cast(past_from(run_tensors(reference, prefix)), dtype)
