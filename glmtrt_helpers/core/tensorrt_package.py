"""Which TensorRT: the GPUs of this machine, the packages that are installed, and the one that is used, with the reason.

`tensorrt-rtx` (module tensorrt_rtx) builds engines without a GPU and runs on consumer cards; `tensorrt` is NVIDIA's
choice for data-centre cards. Both have the same Python names, so everything else is written once against the module
that `choose` returns.
"""

import importlib
import importlib.metadata
import os
import subprocess
from dataclasses import dataclass
from typing import Any

from glmtrt_helpers.core.errors import WorkbookError

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
# Compute capabilities that NVIDIA lists for TensorRT-RTX, and the first release that refuses Hopper at load time.
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
    """The chosen TensorRT: distribution name, release, imported module, and why it and no other."""

    name: str
    version: str
    module: Any
    reason: str


def driver_version() -> str | None:
    """As in "580.159.04"; None without a driver, or without the nvidia-smi that comes with it."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()[0].strip()


def gpus() -> list[Gpu]:
    """The GPUs that the driver shows; none without a driver. PyTorch is not asked: its build may lack CUDA."""
    try:
        from cuda.bindings import driver

        if driver.cuInit(0)[0] != driver.CUresult.CUDA_SUCCESS:
            return []
        found = []
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
            found.append(Gpu(name, (major, minor), int(driver.cuDeviceTotalMem(device)[1])))
        return found
    except (ImportError, RuntimeError, OSError):
        return []


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pass
    try:  # unpacked by hand on a machine that can install nothing, a package has no metadata
        return str(importlib.import_module(package.replace("-", "_")).__version__)
    except (ImportError, AttributeError):
        return None


def verdict(package: str, release: str, gpu: Gpu | None) -> tuple[bool, str]:
    """Whether a package can be used here, and why, as far as NVIDIA says and as was seen."""
    if package == "tensorrt":
        if gpu is None:
            return False, "it needs a GPU, also to build"
        if gpu.capability < TENSORRT_OLDEST:
            return False, f"it does not support compute capability {capability_text(gpu)}"
        return True, f"it supports compute capability {capability_text(gpu)}"
    if gpu is None:
        return True, "it builds engines without a GPU; running one needs a GPU"
    if gpu.capability in RTX_CAPABILITIES:
        return True, f"NVIDIA lists compute capability {capability_text(gpu)} for it"
    if gpu.capability == HOPPER:
        if tuple(int(part) for part in release.split(".")[:2]) < RTX_REFUSES_HOPPER:
            return True, "it builds and runs on Hopper, though NVIDIA does not list it"
        return False, "from 1.7 on it refuses Hopper: install tensorrt-rtx 1.6.1.120 or the full tensorrt"
    instead = ": install the full tensorrt" if gpu.capability >= TENSORRT_OLDEST else ""
    return False, f"NVIDIA does not list compute capability {capability_text(gpu)} for it{instead}"


def capability_text(gpu: Gpu) -> str:
    return ".".join(map(str, gpu.capability))


def choose(explicit: str | None = None, cards: list[Gpu] | None = None, *, building: bool = False) -> Package:
    """The TensorRT package to use, by what is installed, what the first GPU allows, and an explicit choice.

    explicit: "tensorrt" or "tensorrt-rtx"; it is taken or refused, never replaced. cards: `gpus()` by default.
    building: parsing and building are all that is wanted, so tensorrt-rtx does on any machine.
    Where both are installed, tensorrt-rtx goes first on GPUs that NVIDIA lists for it, else tensorrt.
    """
    if explicit is not None and explicit not in MODULES:
        raise WorkbookError(f"{explicit!r} is no TensorRT package: choose tensorrt-rtx or tensorrt.")
    found = gpus() if cards is None else cards
    gpu = found[0] if found else None
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
            chosen = "was asked for" if explicit else "is installed"
            return Package(name, release, _load(name), f"{name} {release} {chosen}; {why}.")
        refused.append(f"{name} {release}: {why}")
    where = f"the {gpu.name}" if gpu else "a machine without a GPU"
    raise WorkbookError(f"no TensorRT can be used on {where} ({'; '.join(refused)}): see `glmtrt doctor`.")


def settle_tf32(allowed: bool) -> None:
    """Whether TensorRT may round fp32 products to TF32 in this process: said before its first use, then for good.

    TensorRT-RTX 1.6.1 writes a cleared BuilderFlag.TF32 into the plan and rounds all the same; it obeys
    NVIDIA_TF32_OVERRIDE=0, reads it once, and loads a plan only under the setting that it was built with.
    Raises WorkbookError where this process has used TensorRT the other way.
    """
    if not _loaded:
        if not allowed:
            os.environ[TF32_VARIABLE] = "0"
    elif allowed != (os.environ.get(TF32_VARIABLE) != "0"):
        now, wanted = ("exact", "rounded to TF32") if allowed else ("rounded to TF32", "exact")
        raise WorkbookError(
            f"in this process TensorRT's fp32 products are {now}, this engine wants them {wanted}, and TensorRT asks "
            "only once: do it in another process, for instance with `glmtrt build` or `glmtrt chat`."
        )


def _load(name: str) -> Any:
    try:
        module = importlib.import_module(MODULES[name])
        _loaded.add(name)
        return module
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        raise WorkbookError(f"{name} is installed and does not load ({reason}): reinstall it.") from error
