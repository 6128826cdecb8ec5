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

CONTEXT_BYTES = 600_000_000  # CUDA's own share of a card, seen on an H200


def report(directory: Path | None = None) -> list[tuple[str, str, str]]:
    """Rows (what, what was found, what follows) on this machine; disk is that of `directory`."""
    gib = 2**30
    memory = psutil.virtual_memory()
    disk = shutil.disk_usage(directory or Path.cwd())
    cards = gpus()
    rows = [
        ("Python", platform.python_version(), "3.11 to 3.13"),
        ("CPU", f"{os.cpu_count()} cores, {platform.machine()}", "2 cores suffice for every notebook"),
        ("memory", f"{memory.total / gib:.0f} GiB, {memory.available / gib:.0f} free", _memory_verdict(memory.total)),
        ("disk", f"{disk.free / gib:.0f} GiB free", _disk_verdict(disk.free)),
    ]
    for gpu in cards:
        capability = ".".join(map(str, gpu.capability))
        rows.append(("GPU", f"{gpu.name}, {gpu.memory / gib:.0f} GiB", f"compute capability {capability}"))
    if not cards:
        rows.append(("GPU", "none", "every notebook runs without one; an engine is built, and answers on a GPU"))
    for package in ("tensorrt-rtx", "tensorrt"):
        release = version(package)
        if release:
            rows.append((package, release, verdict(package, release, cards[0] if cards else None)[1]))
        elif package == "tensorrt-rtx":
            rows.append((package, "not installed", "notebooks 02 to 07 want it: make test or pip install -e ."))
    rows += [(package, version(package) or "not installed", "") for package in ("torch", "transformers", "onnx")]
    rows.append(("ONNX Runtime", version("onnxruntime-gpu") or version("onnxruntime") or "not installed", _providers()))
    return rows


def parts(gpu_memory: int = 0) -> list[tuple[str, str, str]]:
    """Rows (part of the workbook, runs here on the small checkpoint, runs here on the real one)."""
    total = psutil.virtual_memory().total
    free = shutil.disk_usage(Path.cwd()).free
    gb = 10**9

    def verdict(need_memory: float, need_disk: float) -> str:
        if total < need_memory * gb:
            return f"no: needs {need_memory:.0f} GB of memory"
        return "yes" if free > need_disk * gb else f"no: needs {need_disk:.0f} GB of disk"

    return [
        ("00 checkpoint", "yes", verdict(4, 14)),
        ("01 forward inputs", "yes", verdict(8, 14)),
        ("02 patch", "yes", verdict(8, 14)),
        ("03 export", "yes", verdict(4, 14)),
        ("04 inspect", "yes", verdict(4, 14)),
        ("04 verify", "yes", verdict(8, 14)),
        ("05 build", "yes", verdict(15, 27)),
        ("06 chat, on the CPU", "yes", verdict(8, 14) + ", 4 seconds for each token"),
    ]


def model_report(checkpoint: Checkpoint, batch: int, length: int, dtype: str = "fp16") -> list[tuple[str, str, str]]:
    """Rows (part, size, so) on what an engine of this checkpoint takes on a GPU, and which cards hold it."""
    prompt, past = Range(1, 1, length - 1), Range(1, 1, length - 1)
    memory = predict_memory(checkpoint, chat_profiles(checkpoint, Range(1, 1, batch), prompt, past), dtype)
    per_token = memory.cache // (batch * length)
    build, disk = predict_build(checkpoint, dtype)
    shared = ", one vocabulary matrix for both ends" if shares_vocabulary(checkpoint) else ""
    rows = [
        ("weights", _gb(memory.weights), f"{dtype}{shared}"),
        ("cache", _gb(memory.cache), f"{per_token:,} bytes a token, past and present, {batch} x {length} tokens"),
        ("inputs and logits", _gb(memory.io), "logits of every position of the prompt"),
        ("activations", _gb(memory.activations), "at the largest prompt"),
        ("on the GPU in all", _gb(memory.total), "and 0.5 GB or so that CUDA itself takes"),
    ]
    for size in (8, 12, 16, 24, 32, 48, 80):
        if memory.total + CONTEXT_BYTES < size * 2**30:
            rows.append(("smallest card", f"{size} GB", f"{_gb(size * 2**30 - memory.total - CONTEXT_BYTES)} to spare"))
            break
    for gpu in gpus():
        fits = (
            "holds it" if memory.total + CONTEXT_BYTES < gpu.memory else "does not hold it: lower --batch or --length"
        )
        rows.append(("this GPU", _gb(gpu.memory), f"{gpu.name} {fits}"))
    rows.append(("to build it", _gb(build), f"of memory, and {_gb(disk)} of disk; no GPU"))
    return rows


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def _providers() -> str:
    try:
        import onnxruntime

        return ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())
    except ImportError:
        return ""


def _memory_verdict(total: int) -> str:
    return (
        "small checkpoint: 2 GiB; real one: 4 GiB to export, 8 to verify, 15 to build"
        if total >= 2 * 2**30
        else "too little"
    )


def _disk_verdict(free: int) -> str:
    return "room for the real checkpoint (13.4 GB)" if free > 15e9 else "the real checkpoint needs 13.4 GB"
