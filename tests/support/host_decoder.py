"""decoder.cu compiled for the host: its threads are the host's threads, its memory is the host's memory."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.fake_gpu import FakeCuda

from glmtrt_helpers.fast import programs

SOURCE = Path(__file__).parent.parent / "fast" / "decoder_on_cpu.cpp"


def compile_decoder(sizes: programs.Sizes, blocks: int, folder: Path) -> ctypes.CDLL:
    """The program for these sizes, with three stages in its ring; skips the test where g++ is missing."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is missing")
    shared = sizes.rest + 256 * -(-sizes.hidden // 8 // blocks) + 3 * sizes.stage
    options = programs.defines(sizes, blocks, shared)
    assert options["STAGES"] == 3
    target = folder / "decoder.so"
    command = [compiler, "-std=c++20", "-O1", "-ffp-contract=off", "-pthread", "-w", "-shared", "-fPIC"]
    command += [f"-D{name}={value}" for name, value in options.items()] + [f"-I{programs.HERE}", "-o", str(target)]
    subprocess.run([*command, str(SOURCE)], check=True)
    return ctypes.CDLL(str(target))


class HostCard:
    """`programs.Card` over that program; what only prompts need is not there."""

    def __init__(self, gpu: FakeCuda, library: ctypes.CDLL, blocks: int):
        self.gpu, self.library, self.blocks = gpu, library, blocks
        self.steps: list[int] = []  # how many rows each had

    def step(self, step: programs.Step, stream: Any) -> None:
        own = type(step).from_buffer_copy(step)

        def work() -> None:
            self.steps.append(own.row_count)
            kernel = 1 << (own.row_count - 1).bit_length()
            assert self.library.run_step(ctypes.byref(own), kernel) == ctypes.sizeof(own)

        self.gpu._do(work)

    def barriers(self, layers: int) -> int:
        return (2 + 5 * layers) * self.blocks

    def unload(self) -> None:
        """Nothing is loaded."""
