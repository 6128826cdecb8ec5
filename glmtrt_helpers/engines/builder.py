"""Notebook 05: build an engine from the exported ONNX, without a GPU where the package can, and read one back.

The parser takes the weights from the checkpoint's shards, where they are mapped, not copied; the plan is written as it
is made. Precision is the graph's own: the network is strongly typed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.code_hash import code_sha256
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.files import replacing
from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.core.tensorrt_package import Package
from glmtrt_helpers.engines import fp32_accumulation, plan_info
from glmtrt_helpers.engines.callbacks import interruptible, make_log, make_monitor, make_writer
from glmtrt_helpers.engines.memory_prediction import engine_weights, predict_build
from glmtrt_helpers.engines.plan_info import PlanInfo, Tensor, dtype_name
from glmtrt_helpers.engines.profiles import Profile, chat_profiles
from glmtrt_helpers.graphs.tensorrt_parser import parse

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BuildOptions:
    """What can be asked of the builder beside the profiles.

    targets: compute capabilities such as "8.9" to build for; tensorrt-rtx only, whose plans fit all by default.
    weight_streaming: weights may stay in host memory and be streamed to a card that is too small.
    hardware_compatible: the plan runs on every GPU from Ampere on; the full tensorrt only, tensorrt-rtx's plans do.
    version_compatible: later releases load the plan, too; the full tensorrt only.
    tf32: products of fp32 numbers may round their inputs to ten bits; exact products are slower.
    fp16_sums: products of fp16 numbers may be summed up in fp16 (`products`): less exact, and on some cards faster.
    """

    targets: Sequence[str] = ()
    weight_streaming: bool = False
    hardware_compatible: bool = False
    version_compatible: bool = False
    tf32: bool = True
    fp16_sums: bool = False

    def names(self) -> list[str]:
        """As they are written into the JSON."""
        chosen = [name for name in ("weight_streaming", "hardware_compatible", "version_compatible", "fp16_sums")
                  if getattr(self, name)]  # fmt: skip
        return [name.replace("_", "-") for name in chosen] + ([] if self.tf32 else ["no-tf32"])


@dataclass
class BuildReport:
    """What was built. phases: seconds and steps of each phase of the builder, in order of their start."""

    plan: Path
    info: PlanInfo
    package: Package
    phases: dict[str, tuple[float, int]] = field(default_factory=dict)


def build_engine(
    checkpoint: Checkpoint,
    dtype: str = "fp16",
    profiles: Sequence[Profile] | None = None,
    *,
    options: BuildOptions | None = None,
    package: str | None = None,
    onnx_path: Path | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> BuildReport:
    """Build `model.DTYPE.plan` and its JSON from `model.DTYPE.onnx` of the working copy; returns what was built.

    profiles: `profiles.chat_profiles` by default. onnx_path: another graph beside the shards; its plan takes its name.
    progress is called with a phase, its steps done and all its steps: parsing, TensorRT's own phases, writing. Nothing
    is left half-written: the plan appears under its name when all of it is on the disk, and a plan without a matching
    JSON is refused.
    Raises WorkbookError for a missing or unreadable graph, an option that the package has not, a full disk.
    """
    options = options or BuildOptions()
    tensorrt_package.settle_tf32(options.tf32)
    chosen = tensorrt_package.choose(package, building=True)
    check_options(options, chosen)
    source = onnx_path or plan_info.plan_path(checkpoint, dtype).with_suffix(".onnx")
    holds_weights = any(tensor.external_data for tensor in load_graph(source).graph.initializer)
    profiles = list(profiles or chat_profiles(checkpoint))
    if holds_weights:
        check_room(checkpoint, dtype, source.with_suffix(".plan"))
    started = time.perf_counter()
    trt = chosen.module
    log = make_log(trt)
    progress(f"Parsing {source.name}", 0, 1)
    builder, network, parser = _parse(trt, log, source)
    if not options.fp16_sums:
        fp32_accumulation.round_once(trt, network)
    progress(f"Parsing {source.name}", 1, 1)
    config = builder.create_builder_config()
    monitor = make_monitor(trt, progress)
    config.progress_monitor = monitor
    _apply(trt, config, options)
    wide_enough = profiles if holds_weights else [profile.of_two_rows() for profile in profiles]
    shapes = add_profiles(builder, network, config, wide_enough)
    plan = source.with_suffix(".plan")
    expected = engine_weights(checkpoint, dtype) if holds_weights else 0  # nearly all of a large plan

    def written(count: int, last: bool = False) -> None:
        progress(f"Writing {plan.name}, KB", count // 1000, count // 1000 if last else max(count, expected) // 1000 + 1)

    with replacing(plan) as temporary:
        with temporary.open("wb") as stream:
            writer = make_writer(trt, stream, written)
            try:
                with interruptible(monitor):
                    done = builder.build_serialized_network_to_stream(network, config, writer)
            finally:
                writer.settle()
            _check_built(done, monitor, writer, log, plan)
            written(writer.written, last=True)
        info = PlanInfo(
            chosen.name, chosen.version, list(options.targets), options.names(), dtype, profiles,
            _tensors(network, shapes), source.name, plan_info.file_blake3(source), code_sha256(checkpoint.code),
            plan_info.weights_sha256(checkpoint), writer.written, writer.hexdigest(),
            round(time.perf_counter() - started, 2),
        )  # fmt: skip
        plan_info.info_path(plan).unlink(missing_ok=True)  # from here to its rewriting the plan is refused, not misread
    plan_info.write_info(plan, info)
    del parser  # it owns the mapped weights until here
    return BuildReport(plan, info, chosen, monitor.phases)


def check_room(checkpoint: Checkpoint, dtype: str, plan: Path) -> None:
    """Refuse a build that this machine has no memory or no disk for, before it has taken any."""
    memory, disk = predict_build(checkpoint, dtype)
    if memory > free_memory():
        lower = f" `--dtype fp16` needs {predict_build(checkpoint, 'fp16')[0] / 1e9:.1f}." if dtype == "fp32" else ""
        raise WorkbookError(
            f"building {plan.name} needs {memory / 1e9:.1f} GB of memory, and {free_memory() / 1e9:.1f} are free, swap "
            f"counted: end what takes it, or add swap.{lower}"
        )
    free = shutil.disk_usage(plan.parent).free
    if disk > free:
        raise WorkbookError(
            f"{plan} will take {disk / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} free: make room, or remove an "
            "older plan; it is replaced only when the new one is whole."
        )


def free_memory() -> int:
    """Bytes that can still be taken, swap counted, and no more than the container's limit leaves."""
    free = int(psutil.virtual_memory().available + psutil.swap_memory().free)
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def check_options(options: BuildOptions, package: Package) -> None:
    """Refuse what the package does not have, rather than let it be ignored with a warning."""
    if package.name == "tensorrt-rtx":
        for name, why in (
            ("hardware_compatible", "its plans run on every GPU that it supports as they are"),
            ("version_compatible", "it comes without the lean runtime that would load such a plan"),
        ):
            if getattr(options, name):
                raise WorkbookError(f"tensorrt-rtx has no --{name.replace('_', '-')}: {why}; leave it out.")
        known = [name[2:] for name in package.module.ComputeCapability.__members__ if name.startswith("SM")]
        for target in options.targets:
            if target.replace(".", "") not in known:
                texts = ", ".join(f"{name[:-1]}.{name[-1]}" for name in known)
                raise WorkbookError(f"tensorrt-rtx does not build for compute capability {target}: choose of {texts}.")
    elif options.targets:
        raise WorkbookError("the full tensorrt builds for the GPU it runs on: leave --target out.")


def _parse(trt: Any, log: Any, source: Path) -> tuple[Any, Any, Any]:
    builder, network, parser, errors = parse(trt, log, source)
    if errors:
        raise WorkbookError(
            f"{source} cannot be parsed by TensorRT ({errors[0]}): see notebook 05_build_profiles for how to find the "
            "nodes at fault."
        )
    return builder, network, parser


def _apply(trt: Any, config: Any, options: BuildOptions) -> None:
    if options.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.targets:
        config.num_compute_capabilities = len(options.targets)
        for index, target in enumerate(options.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + target.replace(".", "")), index)


def add_profiles(
    builder: Any, network: Any, config: Any, profiles: Sequence[Profile]
) -> dict[str, list[list[list[int]]]]:
    """Give the builder its profiles; returns, by input, what was set."""
    dims = {}
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        named = [tensor.get_dimension_name(axis) if size < 0 else size for axis, size in enumerate(tensor.shape)]
        dims[tensor.name] = named
    shapes: dict[str, list[list[list[int]]]] = {name: [] for name in dims}
    for profile in profiles:
        made = builder.create_optimization_profile()
        for name, named in dims.items():
            low, typical, high = profile.shapes(named)
            made.set_shape(name, low, typical, high)
            shapes[name].append([list(low), list(typical), list(high)])
        if config.add_optimization_profile(made) < 0:
            raise WorkbookError(f"TensorRT does not take the profile {profile}: its ranges contradict the graph.")
    return shapes


def _tensors(network: Any, shapes: dict[str, list[list[list[int]]]]) -> list[Tensor]:
    def describe(tensor: Any, mode: str) -> Tensor:
        return Tensor(tensor.name, mode, dtype_name(tensor.dtype), list(tensor.shape), shapes.get(tensor.name, []))

    inputs = [describe(network.get_input(index), "input") for index in range(network.num_inputs)]
    return inputs + [describe(network.get_output(index), "output") for index in range(network.num_outputs)]


def _check_built(done: bool, monitor: Any, writer: Any, log: Any, plan: Path) -> None:
    if monitor.interrupted:
        raise KeyboardInterrupt
    if writer.error is not None:
        raise WorkbookError(
            f"{plan} could not be written ({writer.error.strerror or writer.error}) after {writer.written:,} bytes: "
            f"free room in {plan.parent} and build again."
        ) from writer.error
    if not done:
        raise WorkbookError(f"TensorRT could not build {plan.name} ({log.first_error()}).")
