"""The CUDA programs `decoder.cu` and `prompt.cu`: the sizes they are compiled for, NVRTC, and launches."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cuda.bindings import driver, nvrtc

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines.cuda import check

HERE = Path(__file__).parent
PARTS = {name: ("primitives.cuh", "attention.cuh", f"{name}.cu") for name in ("decoder", "prompt")}
KERNELS = {
    "decoder": ("step1", "step2", "step4", "step8"),
    "prompt": ("embed", "normalize", "rotate", "attend_tiles", "attend_rows", "choose"),
}
PIECES = 4  # decoder.cu's
TILE = 64  # prompt.cu's
OLDEST = (8, 0)  # mbarrier and cp.async
ENOUGH_STAGES = 7  # of the ring: with more, blocks that run ahead take bandwidth from those that lag


@dataclass(frozen=True)
class Sizes:
    """What the programs are compiled for. warps: that multiply; unit: columns of a stage of the ring."""

    hidden: int
    heads: int
    inner: int
    warps: int
    unit: int

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    @property
    def stage(self) -> int:
        """Bytes of a stage: 8 rows, 64 bytes apart."""
        return 8 * (2 * self.unit + 64)

    @property
    def rest(self) -> int:
        """Bytes of shared memory that decoder.cu takes beside its ring, at most."""
        floats = self.warps * max(PIECES * (self.head + 4), 128) + PIECES * (self.head + 4)
        return 4 * floats + 8192


def sizes_of(checkpoint: Checkpoint) -> Sizes:
    """The sizes of a checkpoint. Raises WorkbookError for those that the programs cannot be compiled for."""
    config = checkpoint.config
    hidden, heads = checkpoint.hidden_size, checkpoint.num_heads
    inner = config.get("inner_hidden_size") or 4 * hidden
    warps, unit = (16, 1024) if hidden % 1024 == 0 else (4, 128)
    head = hidden // heads
    parts = hidden // (32 * warps)
    if hidden % unit or parts & (parts - 1) or inner % hidden or head not in (32, 64, 128) or checkpoint.vocab_size % 8:
        raise WorkbookError(
            f"the one-kernel engine takes a hidden_size of 128, 256 or 512, or a power of two times 1,024, an "
            f"inner_hidden_size that is a multiple of it, heads of 32, 64 or 128 numbers and a vocab_size that is a "
            f"multiple of 8; {checkpoint.name} has {hidden}, {inner}, {head} and {checkpoint.vocab_size}: take another "
            "backend."
        )
    return Sizes(hidden, heads, inner, warps, unit)


def defines(sizes: Sizes, blocks: int, shared: int) -> dict[str, int]:
    """What decoder.cu is compiled with. blocks: multiprocessors of the card; shared: bytes of shared memory of each."""
    # What is kept of the last matrix of a layer grows as the blocks get fewer.
    rest = sizes.rest + 256 * -(-sizes.hidden // 8 // blocks)
    stages = min((shared - rest) // sizes.stage, ENOUGH_STAGES)
    if stages < 2:
        raise WorkbookError(
            f"the one-kernel engine needs {rest + 2 * sizes.stage:,} bytes of shared memory for a block of this "
            f"checkpoint, and this GPU has {shared:,}: take another backend."
        )
    named = {"HIDDEN": sizes.hidden, "HEADS": sizes.heads, "INNER": sizes.inner, "WARPS": sizes.warps}
    return named | {"UNIT": sizes.unit, "STAGES": stages, "BLOCKS": blocks, "RESERVED": rest}


def compile_program(
    name: str, capability: tuple[int, int], options: Mapping[str, int], bulk: bool
) -> tuple[bytes, str]:
    """Machine code for a compute capability, and the compiler's report. Needs NVRTC, but no GPU.

    bulk: with the copy engine of 9.0 and later, see primitives.cuh.
    """
    source = "\n".join((HERE / part).read_text() for part in PARTS[name])
    arguments = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--fmad=false", "--ptxas-options=-v"]
    arguments += [f"-D{key}={value}" for key, value in options.items()] + ["-DBULK"] * bulk + ["-std=c++17"]
    try:
        program = check(
            nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], []), f"begin to compile {name}.cu"
        )
    except (RuntimeError, OSError) as error:
        raise WorkbookError(f"NVRTC is missing ({error}): pip install nvidia-cuda-nvrtc.") from None
    encoded = [argument.encode() for argument in arguments]
    status = int(nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)[0])
    log = b" " * check(nvrtc.nvrtcGetProgramLogSize(program), "read the compiler's report")
    check(nvrtc.nvrtcGetProgramLog(program, log), "read the compiler's report")
    report = log.rstrip(b"\0 \n").decode(errors="replace")
    if status != 0:
        raise WorkbookError(f"{name}.cu was not compiled for {arguments[0]}: {report}")
    code = b" " * check(nvrtc.nvrtcGetCUBINSize(program), "take the compiled kernels")
    check(nvrtc.nvrtcGetCUBIN(program, code), "take the compiled kernels")
    nvrtc.nvrtcDestroyProgram(program)
    return code, report


def resources(report: str) -> dict[str, dict[str, int]]:
    """registers, and bytes of spills, of each kernel in the compiler's report."""
    found = {}
    for part in report.split("Compiling entry function '")[1:]:
        registers, spills = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes spill stores", part)
        found[part.split("'")[0]] = {
            "registers": int(registers[1]) if registers else 0, "spills": int(spills[1]) if spills else 0
        }  # fmt: skip
    return found


_P, _I, _U, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_float
LAYER = (
    *("qkv", "dense", "up", "down", "qkv_bias", "dense_bias", "up_bias", "down_bias"),
    *("norm1", "norm1_bias", "norm2", "norm2_bias"),
)  # the pointers of a `Layer`, in order
ROW = np.dtype([(name, "<i4") for name in ("id", "position", "block_position", "slot", "place", "end")])


class Step(ctypes.Structure):
    """`Step` of decoder.cu."""

    _fields_ = (
        *((name, _P) for name in ("layers", "embedding", "head", "norm", "norm_bias", "cos", "sin", "cache", "rows")),
        *((name, _P) for name in ("tokens", "hidden", "middle", "query", "pieces", "inner", "logits", "best")),
        *(("arrived", _P), ("epoch", _U)),
        *((name, _I) for name in ("layer_count", "row_count", "slots", "room", "vocabulary", "blank")),
        *(("epsilon", _F), ("alpha", _F)),
    )


class Card:
    """The programs, compiled for the current GPU and loaded into its context.

    bulk: None for what the card has; False compiles the form for 8.0 on a later card. shared: bytes of shared memory
    for a block, None for the card's.
    """

    def __init__(self, sizes: Sizes, bulk: bool | None = None, shared: int | None = None):
        device = check(driver.cuCtxGetDevice(), "ask for the current GPU")
        kind = driver.CUdevice_attribute
        capability = tuple(
            int(check(driver.cuDeviceGetAttribute(what, device), "ask what the GPU can do"))
            for what in (
                kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
            )
        )  # fmt: skip
        self.capability = capability[0], capability[1]
        self.blocks = int(
            check(driver.cuDeviceGetAttribute(kind.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device), "ask for blocks")
        )
        most = int(
            check(
                driver.cuDeviceGetAttribute(
                    kind.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device
                ), "ask for shared memory",
            )
        )  # fmt: skip
        self.bulk = self.capability >= (9, 0) if bulk is None else bulk
        self.sizes = sizes
        self.options = defines(sizes, self.blocks, min(shared or most, most))
        self._modules, self.kernels, self.reports = [], {}, {}
        for name, names in KERNELS.items():
            code, self.reports[name] = compile_program(name, self.capability, self.options, self.bulk)
            self._modules.append(check(driver.cuModuleLoadData(code), f"load the kernels of {name}.cu"))
            for kernel in names:
                self.kernels[kernel] = check(
                    driver.cuModuleGetFunction(self._modules[-1], kernel.encode()), f"find the kernel {kernel}"
                )
        self.step_bytes = self.options["STAGES"] * sizes.stage + self.options["RESERVED"]
        self.tile_bytes = TILE * (4 * sizes.head + 80)
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        for kernel, nbytes in {
            **dict.fromkeys(KERNELS["decoder"], self.step_bytes),
            "attend_tiles": self.tile_bytes,
        }.items():
            check(driver.cuFuncSetAttribute(self.kernels[kernel], limit, nbytes), "reserve shared memory")

    def step(self, step: Step, stream: Any) -> None:
        """One step of decoder.cu, of step.row_count rows."""
        rows = 1 << (step.row_count - 1).bit_length()
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(step))
        check(
            driver.cuLaunchCooperativeKernel(
                self.kernels[f"step{rows}"], self.blocks, 1, 1, 32 * self.sizes.warps + 32, 1, 1, self.step_bytes,
                int(stream), ctypes.addressof(parameters),
            ), "run a step",
        )  # fmt: skip

    def barriers(self, layers: int) -> int:
        """By how much a step raises the counter of arrivals at grid barriers."""
        return (2 + 5 * layers) * self.blocks

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        arguments: Sequence[int | float],
        stream: Any,
    ) -> None:
        """A kernel of prompt.cu. arguments: addresses and numbers, each as its kind is in `KINDS`."""
        kinds = KINDS[kernel]
        check(
            driver.cuLaunchKernel(
                self.kernels[kernel], *grid, 1, threads, 1, 1, shared, int(stream), (tuple(arguments), kinds), 0
            ), f"run {kernel}",
        )  # fmt: skip

    def unload(self) -> None:
        while self._modules:
            check(driver.cuModuleUnload(self._modules.pop()), "unload the kernels")


KINDS: dict[str, tuple[Any, ...]] = {
    "embed": (_P,) * 3,
    "normalize": (*(_P,) * 5, _F, _F, _P),
    "rotate": (*(_P,) * 7, _I),
    "attend_tiles": (*(_P,) * 6, _I),
    "attend_rows": (*(_P,) * 5, _I),
    "choose": (_P, _I, _I, *(_P,) * 4),
}
