"""Notebook 05: build an engine from the exported ONNX file, without a GPU where the package can.

The parser maps the weights from the checkpoint's shards instead of copying them, and the plan is written while it is
made. The network is strongly typed: precision is the graph's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.identity import file_blake3, open_export, origin_of
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError, explain
from glmtrt_helpers.core.files import check_writable, replacing
from glmtrt_helpers.core.tensorrt_package import Package
from glmtrt_helpers.engines import plan_info
from glmtrt_helpers.engines.callbacks import interruptible, make_log, make_monitor, plan_writer
from glmtrt_helpers.engines.fp32_accumulation import accumulate_in_fp32
from glmtrt_helpers.engines.memory_prediction import check_room, engine_weights
from glmtrt_helpers.engines.plan_info import PlanInfo, Tensor
from glmtrt_helpers.engines.profiles import Profile, chat_profiles
from glmtrt_helpers.graphs.tensorrt_parser import parse

Progress = Callable[[str, int, int], None]  # a phase, its steps done, all its steps
Shapes = dict[str, list[list[list[int]]]]  # by input: the min, opt and max shape in every profile
SWITCHES = ("weight_streaming", "hardware_compatible", "version_compatible", "fp16_sums")


@dataclass(frozen=True)
class BuildOptions:
    """What the builder can be asked for in addition to profiles.

    targets: compute capabilities to build for, such as "8.9"; tensorrt-rtx only, whose plans run on all by default.
    weight_streaming: weights may stay in host memory and be streamed to a card that is too small for them.
    hardware_compatible: the plan runs on every GPU since Ampere; tensorrt only, the plans of tensorrt-rtx always do.
    version_compatible: later releases load the plan, too; tensorrt only.
    tf32: fp32 matmuls may round their inputs to TF32; without it they are exact, and slower.
    fp16_sums: fp16 matmuls may accumulate in fp16 (`fp32_accumulation`): less exact, and faster on some cards.
    """

    targets: Sequence[str] = ()
    weight_streaming: bool = False
    hardware_compatible: bool = False
    version_compatible: bool = False
    tf32: bool = True
    fp16_sums: bool = False

    def names(self) -> list[str]:
        """The options that are not the default, as the JSON has them."""
        selected = [name for name in SWITCHES if getattr(self, name)]
        return [name.replace("_", "-") for name in selected] + ([] if self.tf32 else ["no-tf32"])


@dataclass
class BuildReport:
    """What was built. phases: seconds and steps of each of the builder's phases, without the phases inside it."""

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

    profiles: `profiles.chat_profiles` by default. onnx_path: another graph next to the shards, which names the plan.
    progress is called with a phase, its steps done and all its steps: parsing, TensorRT's own phases, writing. Nothing
    is left half-written: the plan appears under its name once all of it is on the disk, and a plan without a matching
    JSON is refused.
    Raises WorkbookError as `open_export` does, and for an option that the package does not have, too little memory or
    disk.
    """
    options = options or BuildOptions()
    profiles = list(profiles or chat_profiles(checkpoint))
    source = onnx_path or plan_info.plan_path(checkpoint, dtype).with_suffix(".onnx")
    plan = source.with_suffix(".plan")
    tensorrt_package.settle_tf32(options.tf32)
    selected = tensorrt_package.choose(package, building=True)
    check_options(options, selected)
    check_writable(plan)
    started = time.perf_counter()
    weights = 0
    export = open_export(source, whole=True)
    if export.external:
        weights = engine_weights(checkpoint, dtype)
        check_room(checkpoint, dtype, plan)
    # Where weights are inputs, TensorRT-RTX needs profiles of two rows.
    built_for = profiles if weights else [profile.of_two_rows() for profile in profiles]
    tensors, writer, phases = _write_plan(selected.module, source, plan, built_for, options, weights, progress)
    info = PlanInfo(
        package=selected.name,
        version=selected.version,
        compute_capabilities=list(options.targets),
        options=options.names(),
        dtype=dtype,
        profiles=profiles,
        tensors=tensors,
        onnx=source.name,
        onnx_blake3=file_blake3(source),
        origin=export.origin or origin_of(checkpoint, whole=False),
        plan_bytes=writer.written,
        plan_blake3=writer.hexdigest(),
        seconds=round(time.perf_counter() - started, 2),
    )
    plan_info.write_info(plan, info)
    return BuildReport(plan, info, selected, phases)


def check_options(options: BuildOptions, package: Package) -> None:
    """Refuse options that the package does not have, rather than let it ignore them with a warning."""
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
                raise WorkbookError(
                    f"tensorrt-rtx does not build for compute capability {target}: choose one of {texts}."
                )
    elif options.targets:
        raise WorkbookError("the full tensorrt builds for the GPU it runs on: leave --target out.")


def _write_plan(
    trt: Any,
    source: Path,
    plan: Path,
    profiles: Sequence[Profile],
    options: BuildOptions,
    weights: int,
    progress: Progress,
) -> tuple[list[Tensor], Any, dict[str, tuple[float, int]]]:
    """Parse the graph, build it and write the plan, which replaces an older one when it is complete.

    weights: bytes of weights in the graph, which make up most of a large plan, to estimate its size for the progress.
    Returns the engine's inputs and outputs, the stream writer, and the phases of the build.
    """
    log, monitor = make_log(trt), make_monitor(trt, progress)
    writing = f"Writing {plan.name}, KB"

    def report(count: int) -> None:
        progress(writing, count // 1000, max(count, weights) // 1000 + 1)

    with replacing(plan) as temporary:
        with interruptible(monitor):
            progress(f"Parsing {source.name}", 0, 1)
            builder, network, parser = _parse(trt, log, source)
            if not options.fp16_sums:
                accumulate_in_fp32(trt, network)
            progress(f"Parsing {source.name}", 1, 1)
            config = _configure(trt, builder, options, monitor)
            shapes = add_profiles(builder, network, config, profiles)
            with plan_writer(trt, temporary, report) as writer:
                # the parser reads a graph in one call, after which it is asked whether that was interrupted
                done = not monitor.interrupted and builder.build_serialized_network_to_stream(network, config, writer)
        _check_built(done, writer, log, plan)
        progress(writing, writer.written // 1000, writer.written // 1000)
        plan_info.info_path(plan).unlink(missing_ok=True)  # until it is written again the plan is refused, not misread
    del parser  # it owns the mapped weights until here
    return _tensors(trt, network, shapes), writer, monitor.phases


def _parse(trt: Any, log: Any, source: Path) -> tuple[Any, Any, Any]:
    builder, network, parser, errors = parse(trt, log, source)
    if errors:
        raise WorkbookError(
            f"{source} cannot be parsed by TensorRT ({errors[0]}): see notebook 05_build_profiles for how to find the "
            "nodes at fault."
        )
    return builder, network, parser


def _configure(trt: Any, builder: Any, options: BuildOptions, monitor: Any) -> Any:
    config = builder.create_builder_config()
    config.progress_monitor = monitor
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
    return config


def add_profiles(builder: Any, network: Any, config: Any, profiles: Sequence[Profile]) -> Shapes:
    """Give the builder its profiles; returns what was set."""
    dims = {}
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        named = [tensor.get_dimension_name(axis) if size < 0 else size for axis, size in enumerate(tensor.shape)]
        dims[tensor.name] = named
    shapes: Shapes = {name: [] for name in dims}
    for profile in profiles:
        trt_profile = builder.create_optimization_profile()
        for name, named in dims.items():
            sizes = profile.shapes(named)
            trt_profile.set_shape(name, *sizes)
            shapes[name].append([list(shape) for shape in sizes])
        if config.add_optimization_profile(trt_profile) < 0:
            raise WorkbookError(f"TensorRT rejects the profile {profile}: its ranges contradict the graph.")
    return shapes


def _tensors(trt: Any, network: Any, shapes: Shapes) -> list[Tensor]:
    inputs = [("input", network.get_input(index)) for index in range(network.num_inputs)]
    outputs = [("output", network.get_output(index)) for index in range(network.num_outputs)]
    return [
        Tensor(each.name, mode, np.dtype(trt.nptype(each.dtype)).name, list(each.shape), shapes.get(each.name, []))
        for mode, each in inputs + outputs
    ]


def _check_built(done: bool, writer: Any, log: Any, plan: Path) -> None:
    if writer.error is not None:
        raise WorkbookError(explain(writer.error, plan)) from writer.error
    if not done:
        raise WorkbookError(f"TensorRT could not build {plan.name} ({log.first_error()}).")
