"""`glmtrt doctor`: what this machine has, and which parts of the workbook run on it."""

import os
import platform
import shutil
from pathlib import Path

import psutil

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, shares_vocabulary
from glmtrt_helpers.core.tensorrt_package import gpus, verdict, version
from glmtrt_helpers.engines.memory_prediction import predict_build, predict_memory
from glmtrt_helpers.engines.profiles import Range, chat_profiles
from glmtrt_helpers.fast import memory_prediction as one_kernel

GB, GIB = 10**9, 2**30
CONTEXT_BYTES = 600_000_000  # GPU memory that CUDA itself takes, as seen on an H200


def report() -> list[tuple[str, str, str]]:
    """Rows (item, what was found, what it means) about this machine; the disk is that of the current folder."""
    memory, disk, cards = psutil.virtual_memory(), shutil.disk_usage(Path.cwd()), gpus()
    rows = [
        ("Python", platform.python_version(), "3.11 to 3.13"),
        ("CPU", f"{os.cpu_count()} cores, {platform.machine()}", "2 cores suffice for every notebook"),
        ("memory", f"{memory.total / GIB:.0f} GiB, {memory.available / GIB:.0f} free", _memory_verdict(memory.total)),
        ("disk", f"{disk.free / GIB:.0f} GiB free", _disk_verdict(disk.free)),
    ]
    for gpu in cards:
        compute = f"compute capability {'.'.join(map(str, gpu.capability))}"
        rows.append(("GPU", f"{gpu.name}, {gpu.memory / GIB:.0f} GiB", compute))
    if not cards:
        rows.append(("GPU", "none", "every notebook runs without one; engines build here and run on a GPU"))
    for package in ("tensorrt-rtx", "tensorrt"):
        release = version(package)
        if release:
            rows.append((package, release, verdict(package, release, cards[0] if cards else None)[1]))
        elif package == "tensorrt-rtx":
            rows.append((package, "not installed", "needed by notebooks 02 to 07: make test or pip install -e ."))
    rows += [(package, version(package) or "not installed", "") for package in ("torch", "transformers", "onnx")]
    rows.append(("ONNX Runtime", version("onnxruntime-gpu") or version("onnxruntime") or "not installed", _providers()))
    return rows


def _memory_verdict(total: int) -> str:
    enough = "small checkpoint: 2 GiB; real one: 4 GiB to export, 8 to verify, 15 to build"
    return enough if total >= 2 * GIB else "too little: 2 GiB are needed"


def _disk_verdict(free: int) -> str:
    return "room for the real checkpoint (13.4 GB)" if free > 15 * GB else "the real checkpoint needs 13.4 GB"


def _providers() -> str:
    try:
        import onnxruntime
    except ImportError:
        return ""
    return ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())


def parts() -> list[tuple[str, str, str]]:
    """Rows (part of the workbook, runs here on the small checkpoint, runs here on the real one)."""
    total, free = psutil.virtual_memory().total, shutil.disk_usage(Path.cwd()).free

    def verdict(memory: int, disk: int) -> str:
        if total < memory * GB:
            return f"no: needs {memory} GB of memory"
        return "yes" if free > disk * GB else f"no: needs {disk} GB of disk"

    def on_gpu(memory: int, oldest: tuple[int, int] = (0, 0)) -> str:
        largest = max((gpu.memory for gpu in gpus() if gpu.capability >= oldest), default=0)
        if not largest:
            return "no: needs a GPU" + f" of compute capability {oldest[0]}.{oldest[1]}" * (oldest > (0, 0))
        return "yes" if largest > memory * GB else f"no: needs a GPU of {memory} GB"

    return [
        ("00 checkpoint", "yes", verdict(4, 14)),
        ("01 forward inputs", "yes", verdict(8, 14)),
        ("02 patch", "yes", verdict(8, 14)),
        ("03 export", "yes", verdict(4, 14)),
        ("04 inspect", "yes", verdict(4, 14)),
        ("04 verify", "yes", verdict(8, 14)),
        ("05 build", "yes", verdict(15, 27)),
        ("06 chat, on the CPU", "yes", verdict(8, 14) + ", 4 seconds per token"),
        ("05 and 06, an engine", on_gpu(1), on_gpu(16)),
        ("07 one kernel", on_gpu(1, (8, 0)), on_gpu(14, (8, 0))),
        ("08 locate", "yes", verdict(8, 14)),
    ]


def model_report(checkpoint: Checkpoint, batch: int, length: int, dtype: str = "fp16") -> list[tuple[str, str, str]]:
    """Rows (part, size, note): the GPU memory that an engine of this checkpoint takes, and which cards have it.

    length: tokens of prompt and answer together.
    """
    tokens = Range(1, 1, length - 1)
    memory = predict_memory(checkpoint, chat_profiles(checkpoint, Range(1, 1, batch), tokens, tokens), dtype)
    needed = memory.total + CONTEXT_BYTES
    per_token = memory.cache // (batch * length)
    build, disk = predict_build(checkpoint, dtype)
    shared = ", embedding and lm_head share one matrix" if shares_vocabulary(checkpoint) else ""
    rows = [
        ("weights", _gb(memory.weights), f"{dtype}{shared}"),
        ("cache", _gb(memory.cache), f"{per_token:,} bytes per token, past and present, {batch} x {length} tokens"),
        ("inputs and logits", _gb(memory.io), "logits of every position of the prompt"),
        ("activations", _gb(memory.activations), "at the largest prompt"),
        ("total on the GPU", _gb(memory.total), "plus about 0.5 GB for CUDA itself"),
    ]
    large_enough = [size for size in (8, 12, 16, 24, 32, 48, 80) if needed < size * GIB]
    if large_enough:
        rows.append(("smallest card", f"{large_enough[0]} GB", f"{_gb(large_enough[0] * GIB - needed)} to spare"))
    for gpu in gpus():
        fits = "is large enough" if needed < gpu.memory else "is too small: lower --batch or --length"
        rows.append(("this GPU", _gb(gpu.memory), f"{gpu.name} {fits}"))
    if dtype == "fp16":
        other = one_kernel.predict_memory(checkpoint, batch, batch * (length - 1))
        rows.append(("with --backend cuda", _gb(other.total), "plus about 0.5 GB for CUDA; no engine to build"))
    rows.append(("to build it", _gb(build), f"of memory, and {_gb(disk)} of disk; no GPU"))
    return rows


def _gb(nbytes: float) -> str:
    return f"{nbytes / GB:.2f} GB"
