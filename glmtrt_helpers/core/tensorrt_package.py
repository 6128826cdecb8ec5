"""The choice of TensorRT: this machine's GPUs, the installed packages, and the one to use, with the reason.

`tensorrt-rtx` (module tensorrt_rtx) builds engines without a GPU and runs on consumer cards; `tensorrt` is NVIDIA's
choice for data-centre cards. Both have the same Python API, so everything else is written once, for the module that
`choose` returns.
"""

import importlib
import importlib.metadata
import os
import subprocess
from dataclasses import dataclass
from typing import Any

from glmtrt_helpers.core.errors import WorkbookError

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
# Compute capabilities that TensorRT-RTX supports according to NVIDIA, and the first release that refuses Hopper.
RTX_CAPABILITIES = {(8, 0), (8, 6), (8, 9), (12, 0), (12, 1)}
RTX_REFUSES_HOPPER = (1, 7)
HOPPER = (9, 0)
# TensorRT 10.14 to 11 support Turing and later.
TENSORRT_OLDEST = (7, 5)
TF32_VARIABLE = "NVIDIA_TF32_OVERRIDE"
_loaded: set[str] = set()


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver describes it; memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int


@dataclass(frozen=True)
class Package:
    """The selected TensorRT: distribution name, release, imported module, and why it and no other."""

    name: str
    version: str
    module: Any
    reason: str


def driver_version() -> str | None:
    """The driver's version, such as "580.159.04"; None without a driver or its nvidia-smi."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()[0].strip()


def gpus() -> list[Gpu]:
    """The GPUs that the driver lists; none without a driver. PyTorch is not asked: its build may lack CUDA."""
    try:
        from cuda.bindings import driver  # absent where cuda-python is not installed

        if driver.cuInit(0)[0] != driver.CUresult.CUDA_SUCCESS:
            return []
        listed = []
        attribute = driver.CUdevice_attribute
        for index in range(driver.cuDeviceGetCount()[1]):
            device = driver.cuDeviceGet(index)[1]
            major, minor = (
                driver.cuDeviceGetAttribute(which, device)[1]
                for which in (
                    attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                    attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                )
            )
            name = driver.cuDeviceGetName(256, device)[1].split(b"\0")[0].decode()
            listed.append(Gpu(name, (major, minor), int(driver.cuDeviceTotalMem(device)[1])))
        return listed
    except (ImportError, RuntimeError, OSError):
        return []


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pass
    try:  # a package that was unpacked by hand has no metadata
        return str(importlib.import_module(package.replace("-", "_")).__version__)
    except (ImportError, AttributeError):
        return None


def verdict(package: str, release: str, gpu: Gpu | None) -> tuple[bool, str]:
    """Whether a package can be used with a GPU, or without one, and why: NVIDIA's lists and our own measurements."""
    if package == "tensorrt":
        if gpu is None:
            return False, "needs a GPU, even to build"
        if gpu.capability < TENSORRT_OLDEST:
            return False, f"compute capability {capability_text(gpu)} is not supported"
        return True, f"compute capability {capability_text(gpu)} is supported"
    if gpu is None:
        return True, "it builds engines without a GPU; running one needs a GPU"
    if gpu.capability in RTX_CAPABILITIES:
        return True, f"compute capability {capability_text(gpu)} is supported, according to NVIDIA"
    if gpu.capability == HOPPER:
        if tuple(int(part) for part in release.split(".")[:2]) < RTX_REFUSES_HOPPER:
            return True, "it builds and runs on Hopper, though NVIDIA does not list it"
        return False, "refuses Hopper since 1.7: install tensorrt-rtx 1.6.1.120 or the full tensorrt"
    instead = ": install the full tensorrt" if gpu.capability >= TENSORRT_OLDEST else ""
    return False, f"compute capability {capability_text(gpu)} is not supported, according to NVIDIA{instead}"


def capability_text(gpu: Gpu) -> str:
    """Such as "8.9"."""
    return ".".join(map(str, gpu.capability))


def choose(explicit: str | None = None, cards: list[Gpu] | None = None, *, building: bool = False) -> Package:
    """The TensorRT package to use, by what is installed, what the first GPU allows, and an explicit choice.

    explicit: "tensorrt" or "tensorrt-rtx"; it is used or refused, never replaced. cards: `gpus()` by default.
    building: only to parse and build, which tensorrt-rtx can on any machine.
    Where both are installed, tensorrt-rtx goes first on GPUs that it supports according to NVIDIA, elsewhere tensorrt.
    Raises WorkbookError where none can be used.
    """
    if explicit is not None and explicit not in MODULES:
        raise WorkbookError(f"{explicit!r} is no TensorRT package: choose tensorrt-rtx or tensorrt.")
    cards = gpus() if cards is None else cards
    gpu = cards[0] if cards else None
    order = list(MODULES)
    if gpu and gpu.capability not in RTX_CAPABILITIES:
        order.reverse()
    refused = []
    for name in [explicit] if explicit else order:
        release = version(name)
        if release is None:
            refused.append(f"{name} is not installed")
            continue
        usable, why = verdict(name, release, gpu)
        if not usable and building and name == "tensorrt-rtx":
            usable, why = True, f"it builds engines for other GPUs ({why})"
        if usable:
            selected = "was asked for" if explicit else "is installed"
            return Package(name, release, _load(name), f"{name} {release} {selected}; {why}.")
        refused.append(f"{name} {release}: {why}")
    where = f"the {gpu.name}" if gpu else "a machine without a GPU"
    raise WorkbookError(f"no TensorRT can be used on {where} ({'; '.join(refused)}): see `glmtrt doctor`.")


def settle_tf32(allowed: bool) -> None:
    """Decide whether TensorRT may round the inputs of fp32 matmuls to TF32: once per process, before its first use.

    TensorRT-RTX 1.6.1 writes a cleared BuilderFlag.TF32 into the plan but rounds all the same; it obeys
    NVIDIA_TF32_OVERRIDE=0, reads it once, and loads a plan only with the setting that it was built with.
    Raises WorkbookError where this process has used TensorRT with the other setting.
    """
    if not _loaded:
        if not allowed:
            os.environ[TF32_VARIABLE] = "0"
    elif allowed != (os.environ.get(TF32_VARIABLE) != "0"):
        actual, expected = ("exact", "rounded to TF32") if allowed else ("rounded to TF32", "exact")
        raise WorkbookError(
            f"in this process the inputs of TensorRT's fp32 matmuls are {actual}, this engine needs them {expected}, "
            "and TensorRT reads the setting only once: use another process, such as `glmtrt build` or `glmtrt chat`."
        )


def _load(name: str) -> Any:
    try:
        module = importlib.import_module(MODULES[name])
        _loaded.add(name)
        return module
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        raise WorkbookError(f"{name} is installed but does not load ({reason}): reinstall it.") from error
