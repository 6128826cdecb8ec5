"""The two CUDA kernels of the fast engine, `attend.cu`: compiled by NVRTC for the GPU here, launched into a stream."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cuda.bindings import driver, nvrtc

from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines.cuda import check

SOURCE = Path(__file__).parent / "attend.cu"
THREADS, TOKENS, MOST = 128, 32, 128  # of a block, of a round of a block, blocks of a head
ENOUGH = 512  # blocks
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
_ATTEND = (_POINTER,) * 10 + (_INT, _INT, _INT, _FLOAT)
_ADVANCE = (_POINTER, _POINTER, _INT)


def blocks_of(tokens: int, heads: int) -> tuple[int, int]:
    """Blocks that share each of so many heads' past, the new token counted, and the tokens of a block.

    A few blocks for each of a card's multiprocessors are enough; more of them cost more than they bring. The past is
    taken as the next power of two, so that few numbers occur.
    """
    rounds = -(-tokens // TOKENS)
    rounds = 1 << (rounds - 1).bit_length()
    blocks = max(1, min(rounds, MOST, ENOUGH // heads))
    blocks = 1 << (blocks.bit_length() - 1)
    return blocks, TOKENS * rounds // blocks


def partial_bytes(batch: int, heads: int, head_size: int) -> int:
    """What blocks leave for the last one of a head, at most."""
    return max(ENOUGH, batch * heads) * (head_size + 2) * 4


def check_head_size(head_size: int, dtype: np.dtype) -> None:
    """A row of a head is read by a power of two of threads, at most 32, with 16 bytes each."""
    lanes = head_size * dtype.itemsize // 16
    if head_size > THREADS or lanes * 16 != head_size * dtype.itemsize or lanes not in (1, 2, 4, 8, 16, 32):
        raise WorkbookError(
            f"the fast engine's attention takes heads of 8 to 128 numbers, a power of two; this checkpoint's have "
            f"{head_size}: leave --fast out."
        )


def defines(head_size: int, dtype: np.dtype) -> list[str]:
    """What the source is compiled with, by whatever compiler."""
    sizes = {"D": head_size, "THREADS": THREADS, "TOKENS": TOKENS, "MOST": MOST}
    return [f"-D{name}={size}" for name, size in sizes.items()] + ["-DHALF"] * (dtype == np.float16)


def compile_source(capability: tuple[int, int], head_size: int, dtype: np.dtype) -> bytes:
    """Machine code for a compute capability. Needs NVRTC, but no GPU."""
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", *defines(head_size, dtype)]
    try:
        program = check(
            nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), b"attend.cu", 0, [], []), "begin to compile attend.cu"
        )
    except (RuntimeError, OSError) as error:
        raise WorkbookError(f"NVRTC is missing ({error}): pip install nvidia-cuda-nvrtc.") from None
    encoded = [option.encode() for option in options]
    if int(nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)[0]) != 0:
        log = b" " * check(nvrtc.nvrtcGetProgramLogSize(program), "read the compiler's words")
        check(nvrtc.nvrtcGetProgramLog(program, log), "read the compiler's words")
        raise WorkbookError(f"attend.cu was not compiled for {options[0]}: {log.decode(errors='replace').strip()}")
    code = b" " * check(nvrtc.nvrtcGetCUBINSize(program), "take the compiled kernels")
    check(nvrtc.nvrtcGetCUBIN(program, code), "take the compiled kernels")
    nvrtc.nvrtcDestroyProgram(program)
    return code


class Kernels:
    """The kernels, loaded into the current context. heads, head_size and dtype: of the checkpoint."""

    def __init__(self, capability: tuple[int, int], heads: int, head_size: int, dtype: np.dtype):
        check_head_size(head_size, dtype)
        self.heads, self.scale = heads, head_size**-0.5
        self._module = check(
            driver.cuModuleLoadData(compile_source(capability, head_size, dtype)), "load the compiled kernels"
        )
        self._attend, self._advance = (
            check(driver.cuModuleGetFunction(self._module, name), "find a compiled kernel")
            for name in (b"attend", b"advance")
        )

    def attend(self, addresses: Sequence[int], batch: int, room: int, tokens: int, stream: Any) -> None:
        """Attention of one new token a row, and its key and value into the cache of one layer.

        addresses: of mixed, bias, cos, sin, keys, values, seen, places, partial, arrived, as the source says.
        room: tokens that the cache holds. tokens: the largest past of the rows and the new one.
        """
        blocks, span = blocks_of(tokens, batch * self.heads)
        arguments = (*addresses, self.heads, room, span, self.scale)
        self._launch(self._attend, (blocks, self.heads, batch), arguments, _ATTEND, stream)

    def advance(self, position_ids: int, places: int, batch: int, stream: Any) -> None:
        """Positions (batch, 2, 1) and places (batch,) of the token that follows."""
        self._launch(self._advance, (-(-batch // THREADS), 1, 1), (position_ids, places, batch), _ADVANCE, stream)

    def _launch(self, kernel: Any, grid: tuple[int, int, int], values: tuple, kinds: tuple, stream: Any) -> None:
        check(driver.cuLaunchKernel(kernel, *grid, THREADS, 1, 1, 0, int(stream), (values, kinds), 0), "run a kernel")

    def unload(self) -> None:
        check(driver.cuModuleUnload(self._module), "unload the kernels")
