"""The JSON next to a plan, `model.fp16.plan.json`: how the engine was built, so that a wrong one is refused early.

TensorRT says little about a plan that it rejects, and only where there is a GPU. So the build records what it read and
what it wrote, and `open_plan` compares that with the files and packages as they are now.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.identity import Origin, check_origin, file_blake3
from glmtrt_helpers.core import records, tensorrt_package
from glmtrt_helpers.core.artifacts import cli_options
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.files import replacing
from glmtrt_helpers.core.tensorrt_package import Package
from glmtrt_helpers.engines.profiles import Profile

FORMAT: Literal[4] = 4  # of the JSON


@dataclass(frozen=True)
class Tensor:
    """One input or output of an engine.

    mode: "input" or "output". dtype: NumPy's name. shape: -1 where dynamic. profiles: of an input, the min, opt and max
    shape in every profile.
    """

    name: str
    mode: Annotated[str, msgspec.Meta(pattern="^(input|output)$")]
    dtype: str
    shape: list[int]
    profiles: list[list[list[int]]] = field(default_factory=list)


@dataclass(frozen=True)
class PlanInfo:
    """What the build recorded. compute_capabilities: empty if the plan runs on every GPU that the package supports."""

    package: Annotated[str, msgspec.Meta(pattern="^tensorrt(-rtx)?$")]
    version: str
    compute_capabilities: list[str]
    options: list[str]
    dtype: Annotated[str, msgspec.Meta(pattern="^fp(16|32)$")]
    profiles: list[Profile]
    tensors: list[Tensor]
    onnx: str
    onnx_blake3: str
    origin: Origin
    plan_bytes: Annotated[int, msgspec.Meta(ge=0)]
    plan_blake3: str
    seconds: float
    format: Literal[4] = FORMAT

    def __post_init__(self) -> None:
        profiles = {len(tensor.profiles) for tensor in self.tensors if tensor.profiles}
        if not self.onnx.endswith(".onnx") or "/" in self.onnx or profiles - {len(self.profiles)}:
            raise ValueError("its parts contradict each other")

    @property
    def version_compatible(self) -> bool:
        return "version-compatible" in self.options

    @property
    def tf32(self) -> bool:
        return "no-tf32" not in self.options


def plan_path(checkpoint: Checkpoint, dtype: str) -> Path:
    """`model.fp16.plan` in the working copy."""
    return checkpoint.directory / f"model.{dtype}.plan"


def info_path(plan: Path) -> Path:
    return plan.with_name(plan.name + ".json")


def write_info(plan: Path, info: PlanInfo) -> None:
    text = json.dumps(asdict(info), indent=1, ensure_ascii=False)
    with replacing(info_path(plan)) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_info(plan: Path) -> PlanInfo:
    """The JSON next to a plan. Raises WorkbookError if either is missing or the JSON cannot be read."""
    again = f"run notebook 05_build_profiles or `glmtrt build {plan.parent}{cli_options(plan)}`"
    if not plan.exists():
        raise WorkbookError(f"{plan} is missing: {again}.")
    path = info_path(plan)
    try:
        return records.read(path, PlanInfo, again)
    except FileNotFoundError:
        raise WorkbookError(f"{path} is missing, so nothing is known of {plan.name}: {again}.") from None


def open_plan(checkpoint: Checkpoint, plan: Path) -> PlanInfo:
    """The JSON of an engine, once the plan is known to be the one described there, and up to date.

    Neither a GPU nor TensorRT is needed. Raises WorkbookError for a plan that is truncated or damaged, was built by
    another package, or from another graph, source or weights.
    """
    info = read_info(plan)
    again = f"build it again with `glmtrt build {plan.parent} --dtype {info.dtype}`"
    size = plan.stat().st_size
    if size != info.plan_bytes:
        raise WorkbookError(f"{plan} is truncated: {size:,} of {info.plan_bytes:,} bytes; {again}.")
    installed = tensorrt_package.version(info.package)
    if installed is None:
        raise WorkbookError(f"{plan} was built by {info.package}, which is not installed: {again}, or install it.")
    if installed != info.version and not (info.version_compatible and release(installed) > release(info.version)):
        raise WorkbookError(
            f"{plan} was built by {info.package} {info.version}; the installed {installed} cannot load it: {again}, or "
            "install that release."
        )
    _check_sources(checkpoint, plan, info, again)
    if file_blake3(plan) != info.plan_blake3:
        raise WorkbookError(f"{plan} was damaged or replaced since it was built (its hash differs): {again}.")
    return info


def check_plan(checkpoint: Checkpoint, plan: Path) -> tuple[Path, PlanInfo, Package]:
    """The plan, its JSON and the package that runs it here. A GPU is looked for first: without one no plan is of use.

    Raises WorkbookError without a GPU, as `open_plan` does, and for a GPU that plan or package does not support.
    """
    cards = tensorrt_package.gpus()
    if not cards:
        raise WorkbookError(
            "no GPU, or its driver does not answer; an engine needs one: use the backend ort or torch, see "
            "`glmtrt doctor`."
        )
    info = open_plan(checkpoint, plan)
    here = tensorrt_package.capability_text(cards[0])
    if info.compute_capabilities and here not in info.compute_capabilities:
        raise WorkbookError(
            f"{plan} was built only for compute capability {', '.join(info.compute_capabilities)}, the "
            f"{cards[0].name} has {here}: build it again without --target, or with --target {here}."
        )
    tensorrt_package.settle_tf32(info.tf32)
    return plan, info, tensorrt_package.choose(info.package, cards)


def _check_sources(checkpoint: Checkpoint, plan: Path, info: PlanInfo, again: str) -> None:
    """The graph, the source and the weights in the working copy are those that the plan was built from."""
    onnx = plan.parent / info.onnx
    if not onnx.is_file() or file_blake3(onnx) != info.onnx_blake3:
        raise WorkbookError(f"{plan} was built from another {info.onnx} than the one next to it: {again}.")
    export = f"export with `glmtrt export {plan.parent}{cli_options(onnx)}`, then {again}"
    check_origin(info.origin, plan, checkpoint.directory, export)


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def tensor_rows(tensors: Sequence[Tensor], profile: int) -> list[tuple[str, ...]]:
    """Rows (name, mode, dtype, shape, min, opt, max) of one profile; an output has no min, opt and max."""
    rows = []
    for tensor in tensors:
        shapes = map(_shape_text, tensor.profiles[profile]) if tensor.profiles else ["", "", ""]
        rows.append((tensor.name, tensor.mode, tensor.dtype, _shape_text(tensor.shape), *shapes))
    return rows


def _shape_text(shape: Sequence[int]) -> str:
    """As in "?x1x4x16"."""
    return "x".join("?" if size < 0 else str(size) for size in shape)
