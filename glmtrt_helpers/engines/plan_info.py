"""What stands beside an engine: `model.fp16.plan.json` says how it was built, so that a wrong one is refused early.

TensorRT says little about a plan that it does not like, and only where there is a GPU. So the build writes down what
it read and what it wrote, and `open_plan` compares that with the files and packages as they are now.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.code_hash import code_sha256
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.artifacts import cli_options, is_part
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.files import replacing
from glmtrt_helpers.core.tensorrt_package import Package
from glmtrt_helpers.engines.profiles import Profile


def dtype_name(kind: Any) -> str:
    """TensorRT's type by NumPy's name."""
    return {"HALF": "float16", "FLOAT": "float32", "BOOL": "bool"}.get(kind.name, kind.name.lower())


FORMAT = 2
SAMPLE = 4096


@dataclass(frozen=True)
class Tensor:
    """One IO tensor. mode: "input" or "output". profiles: for an input, min, opt and max shape of every profile."""

    name: str
    mode: str
    dtype: str
    shape: list[int]
    profiles: list[list[list[int]]] = field(default_factory=list)


@dataclass(frozen=True)
class PlanInfo:
    """What the build wrote down. Sizes in bytes; compute_capabilities is empty where the plan fits every listed GPU."""

    package: str
    version: str
    compute_capabilities: list[str]
    options: list[str]
    dtype: str
    profiles: list[Profile]
    tensors: list[Tensor]
    onnx: str
    onnx_blake3: str
    code_sha256: str
    weights_sha256: str
    plan_bytes: int
    plan_blake3: str
    seconds: float
    format: int = FORMAT

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
    """The JSON beside a plan. Raises WorkbookError where either is missing or the JSON is not one of ours."""
    again = f"run notebook 05_build_profiles or `glmtrt build {plan.parent}{cli_options(plan)}`"
    if not plan.exists():
        raise WorkbookError(f"{plan} is missing: {again}.")
    path = info_path(plan)
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        if entry["format"] != FORMAT:
            raise ValueError(f"format {entry['format']}")
        entry["profiles"] = [Profile.from_dict(profile) for profile in entry["profiles"]]
        entry["tensors"] = [Tensor(**tensor) for tensor in entry["tensors"]]
        return PlanInfo(**entry)
    except FileNotFoundError:
        raise WorkbookError(f"{path} is missing, so nothing is known of {plan.name}: {again}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise WorkbookError(f"{path} cannot be read ({type(error).__name__}: {error}): {again}.") from None


def open_plan(checkpoint: Checkpoint, plan: Path) -> PlanInfo:
    """The JSON of an engine that may be used. Raises WorkbookError for a truncated, foreign or stale one.

    No GPU is looked for, and nothing of TensorRT is loaded.
    """
    info = read_info(plan)
    fast = " --fast" if is_part(plan) else ""
    again = f"build it again with `glmtrt build {plan.parent} --dtype {info.dtype}{fast}`"
    size = plan.stat().st_size
    if size != info.plan_bytes:
        raise WorkbookError(f"{plan} has {size:,} bytes, {info.plan_bytes:,} were written, so it is cut: {again}.")
    here = tensorrt_package.version(info.package)
    if here is None:
        raise WorkbookError(f"{plan} was built by {info.package}, which is not installed: {again}, or install it.")
    if here != info.version and not (info.version_compatible and release(here) > release(info.version)):
        raise WorkbookError(
            f"{plan} was built by {info.package} {info.version}, here is {here}, which does not load it: {again}, or "
            "install that release."
        )
    _check_sources(checkpoint, plan, info, again)
    if file_blake3(plan) != info.plan_blake3:
        raise WorkbookError(f"{plan} does not hold the bytes that were written, it was damaged or replaced: {again}.")
    return info


def check_plan(checkpoint: Checkpoint, plan: Path) -> tuple[Path, PlanInfo, Package]:
    """The plan, its JSON and the package that runs it. The JSON is asked before any GPU is looked for."""
    info = open_plan(checkpoint, plan)
    cards = tensorrt_package.gpus()
    if not cards:
        raise WorkbookError(
            "there is no GPU here, or its driver does not answer, and an engine runs only on one: take the "
            "backend ort or torch, and see `glmtrt doctor`."
        )
    here = tensorrt_package.capability_text(cards[0])
    if info.compute_capabilities and here not in info.compute_capabilities:
        raise WorkbookError(
            f"{plan} was built for compute capability {', '.join(info.compute_capabilities)} only, the "
            f"{cards[0].name} has {here}: build it again without --target, or with --target {here}."
        )
    tensorrt_package.settle_tf32(info.tf32)
    return plan, info, tensorrt_package.choose(info.package, cards)


def _check_sources(checkpoint: Checkpoint, plan: Path, info: PlanInfo, again: str) -> None:
    """The graph, the source and the weights that the plan was made of are those in the working copy."""
    onnx = plan.parent / info.onnx
    if not onnx.exists() or file_blake3(onnx) != info.onnx_blake3:
        raise WorkbookError(f"{plan} was built from another {info.onnx} than the one beside it: {again}.")
    if code_sha256(checkpoint.code) != info.code_sha256:
        raise WorkbookError(
            f"{plan} was built from another state of {checkpoint.code.name}: export with `glmtrt export "
            f"{plan.parent}{cli_options(onnx)}`, then {again}."
        )
    if weights_sha256(checkpoint) != info.weights_sha256:
        raise WorkbookError(f"{plan} was built from other weights than those in {plan.parent}: {again}.")


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def file_blake3(path: Path) -> str:
    """Of a large plan, whose 12 GB may have to come from the disk, once per process; one that was touched, again.

    BLAKE3 and not SHA-256, which takes twelve seconds for so much; `b3sum` prints the same.
    """
    stat = path.stat()
    if stat.st_size < 10**9:
        return _read_blake3(path)
    return _large_blake3(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@functools.lru_cache
def _large_blake3(path: Path, size: int, mtime_ns: int, inode: int) -> str:
    return _read_blake3(path)


def _read_blake3(path: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def weights_sha256(checkpoint: Checkpoint) -> str:
    """A fingerprint of the weights: names, places, and the first and middle bytes of every tensor.

    Reading all of 13 GB at each start would take longer than loading the engine; retrained or merged weights differ
    everywhere.
    """
    digest = hashlib.sha256()
    for file in sorted({tensor.file for tensor in checkpoint.tensors.values()}):
        with file.open("rb") as stream:
            for name, tensor in sorted(checkpoint.tensors.items()):
                if tensor.file != file or tensor.offset is None:
                    continue
                digest.update(f"{name} {tensor.dtype} {tensor.shape} {tensor.offset}".encode())
                for at in (0, tensor.nbytes // 2):
                    stream.seek(tensor.offset + at)
                    digest.update(stream.read(min(SAMPLE, tensor.nbytes - at)))
    return digest.hexdigest()


def tensor_rows(tensors: Sequence[Tensor], profile: int) -> list[tuple[str, ...]]:
    """Rows (name, mode, dtype, shape, min, opt, max) of one profile, as the table of `glmtrt build` prints them."""
    rows = []
    for tensor in tensors:
        shapes: list[Any] = tensor.profiles[profile] if tensor.profiles else ["", "", ""]
        texts = (_shape(shape) for shape in (tensor.shape, *shapes))
        rows.append((tensor.name, tensor.mode, tensor.dtype, *texts))
    return rows


def _shape(shape: Sequence[int] | str) -> str:
    return shape if isinstance(shape, str) else "x".join("?" if size < 0 else str(size) for size in shape)
