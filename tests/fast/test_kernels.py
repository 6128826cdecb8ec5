"""The CUDA kernels: their source run on the host, thread by thread, against the formula; on a GPU they themselves."""

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines import cuda
from glmtrt_helpers.fast import kernels

HERE = Path(__file__).parent
Given = dict[str, Any]
NAMES = ("mixed", "bias", "cos", "sin", "keys", "values", "seen", "places")
SHAPES = [
    # batch, heads, head size, room, places of the new token
    (1, 2, 128, 200, [150]),
    (1, 1, 128, 130, [0]),
    (2, 2, 32, 300, [299, 64]),
    (2, 1, 16, 256, [127, 1]),
    (3, 2, 32, 140, [31, 32, 130]),
]


def make(shape: Any, dtype: np.dtype) -> Given:
    batch, heads, size, room, places = shape
    random = np.random.default_rng(0)
    sizes = {"mixed": (batch, heads, 3, size), "bias": (heads, 3, size), "cos": (batch, size), "sin": (batch, size)}
    sizes |= {name: (batch, room, heads, size) for name in ("keys", "values")}
    given = {name: random.standard_normal(shape).astype(dtype) for name, shape in sizes.items()}
    for row, place in enumerate(places):  # what may not be seen is no number
        for name in ("keys", "values"):
            given[name][row, place:] = np.nan
    return given | {"seen": np.full((batch, heads, size), np.nan, dtype), "places": np.array(places, np.int64)}


def new_rows(given: Given) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query, key and value of the new tokens, (batch, heads, d), in fp64."""
    mixed = given["mixed"].astype(np.float64) + given["bias"]
    first, second, third, fourth = np.split(mixed[:, :, :2], 4, axis=-1)
    swapped = np.concatenate([second, first, fourth, third], axis=-1)
    turned = mixed[:, :, :2] * given["cos"][:, None, None] + swapped * given["sin"][:, None, None]
    return turned[:, :, 0], turned[:, :, 1], mixed[:, :, 2]


def wanted(given: Given) -> np.ndarray:
    """Softmax over what the cache holds up to the new token, whose key and value are in it by then, in fp64."""
    query = new_rows(given)[0]
    out = np.empty(query.shape)
    for row, place in enumerate(given["places"]):
        for head in range(query.shape[1]):
            keys, values = (given[name][row, : place + 1, head].astype(np.float64) for name in ("keys", "values"))
            scores = keys @ query[row, head] / np.sqrt(query.shape[-1])
            shares = np.exp(scores - scores.max())
            out[row, head] = shares @ values / shares.sum()
    return out


def check(given: Given, run: Callable[[Given], None], dtype: np.dtype) -> None:
    before = {name: given[name].copy() for name in ("keys", "values")}
    run(given)
    # The result is rounded once, to eleven bits.
    assert np.allclose(given["seen"], wanted(given), rtol=2**-11 if dtype == np.float16 else 0, atol=1e-5)
    _, key, value = new_rows(given)
    for name, new in (("keys", key), ("values", value)):
        for row, place in enumerate(given["places"]):
            assert np.allclose(given[name][row, place], new[row], rtol=1e-3 if dtype == np.float16 else 1e-6, atol=1e-6)
            before[name][row, place] = given[name][row, place]
        assert np.array_equal(given[name], before[name], equal_nan=True), "one row is written, at its place"


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is missing")
    folder, built = tmp_path_factory.mktemp("attend"), {}

    def run(given: Given, busy: int = 1) -> None:
        batch, heads, size = given["seen"].shape
        half, room = given["seen"].dtype == np.float16, given["keys"].shape[1]
        if (size, half) not in built:
            target = folder / f"attend{size}{half}.so"
            options = [*kernels.defines(size, given["seen"].dtype), "-std=c++20", "-O1", "-pthread", "-w"]
            options += [f"-I{kernels.SOURCE.parent}", "-shared", "-fPIC", "-o", str(target)]
            command = [compiler, *options, str(HERE / "attend_on_cpu.cpp")]
            subprocess.run(command, check=True)
            built[size, half] = ctypes.CDLL(str(target)).run
        tokens = int(given["places"].max()) + 1
        blocks, span = kernels.blocks_of(tokens, batch * heads * busy)
        order = np.random.default_rng(1).permutation(blocks * heads * batch).astype(np.int32)
        partial = np.full(kernels.partial_bytes(batch, heads, size) // 4, np.nan, np.float32)
        arrived = np.zeros(batch * heads, np.uint32)
        arrays = [np.ascontiguousarray(given[name]) for name in NAMES]
        places = [ctypes.c_void_p(array.ctypes.data) for array in (*arrays, partial, arrived)]
        for _ in range(2):  # the second time finds the counters as the first one left them
            built[size, half](
                ctypes.c_void_p(order.ctypes.data), len(order), blocks, heads, batch, *places, room, span,
                ctypes.c_float(size**-0.5),
            )  # fmt: skip
        assert not arrived.any()

    return run


@pytest.mark.parametrize("dtype", [np.dtype("f2"), np.dtype("f4")])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("busy", [1, 256, 10**6])
def test_attention_thread_by_thread(shape: Any, busy: int, dtype: np.dtype, on_host: Callable[..., None]) -> None:
    """With a block for each round, with some rounds in a block, and with one block a head, as a large batch has it."""
    check(make(shape, dtype), functools.partial(on_host, busy=busy), dtype)


def on_gpu(given: Given) -> None:

    batch, heads, size = given["seen"].shape
    tokens, stream = int(given["places"].max()) + 1, cuda.new_stream()
    sizes = {name: given[name].nbytes for name in NAMES}
    sizes |= {"partial": kernels.partial_bytes(batch, heads, size), "arrived": 4 * batch * heads}
    memory = cuda.DeviceMemory(sum(map(cuda.aligned, sizes.values())), "a test")
    memory.clear()
    places = memory.divide(sizes)
    for name in NAMES:
        places[name].fill(given[name], stream)
    made = kernels.Kernels(tensorrt_package.gpus()[0].capability, heads, size, given["seen"].dtype)
    for _ in range(2):
        made.attend([p.address for p in places.values()], batch, given["keys"].shape[1], tokens, stream)
    for name in ("seen", "keys", "values"):
        cuda.read_rows(given[name].reshape(1, -1), places[name].address, given[name].nbytes, stream)
    positions = np.stack([np.full(batch, 7), np.arange(batch)], axis=1).astype(np.int64)
    places["partial"].fill(positions, stream)
    made.advance(places["partial"].address, places["places"].address, batch, stream)
    moved = np.empty_like(positions)
    cuda.read_rows(moved.reshape(1, -1), places["partial"].address, moved.nbytes, stream)
    assert (moved == positions + np.array([0, 1])).all()
    after = np.empty_like(given["places"])
    cuda.read_rows(after.reshape(1, -1), places["places"].address, after.nbytes, stream)
    assert (after == given["places"] + 1).all()
    made.unload()
    memory.free()
    cuda.destroy_stream(stream)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.dtype("f2"), np.dtype("f4")])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 32, 128, 2048, [2047, 700]), (70, 32, 128, 300, [280] * 70)])
def test_attention_on_the_gpu(shape: Any, dtype: np.dtype) -> None:
    check(make(shape, dtype), on_gpu, dtype)


@pytest.mark.parametrize("dtype", [np.dtype("f2"), np.dtype("f4")])
def test_the_source_is_compiled_without_a_gpu(dtype: np.dtype) -> None:
    for capability in ((8, 0), (9, 0), (12, 0)):
        code = kernels.compile_source(capability, 128, dtype)
        assert code.startswith(b"\x7fELF") and b"attend" in code and b"advance" in code


def test_blocks_share_a_past() -> None:
    """Of 32 heads, as long as the card has room for more blocks; what they take together is the whole past."""
    assert [kernels.blocks_of(n, 32) for n in (1, 32, 33, 300, 2048)] == [
        (1, 32),
        (1, 32),
        (2, 32),
        (16, 32),
        (16, 128),
    ]
    assert [kernels.blocks_of(n, 32 * 8) for n in (1, 300, 2048)] == [(1, 32), (2, 256), (2, 1024)]
    assert kernels.blocks_of(513, 32 * 64) == (1, 1024)
    for heads in (1, 4, 32, 96, 2048):
        for tokens in range(1, 2049, 13):
            blocks, span = kernels.blocks_of(tokens, heads)
            assert blocks * span >= tokens and span % 32 == 0 and blocks <= kernels.MOST
            assert blocks * heads * 4 * 34 <= kernels.partial_bytes(1, heads, 32) or blocks == 1


def test_heads_that_the_kernel_does_not_take() -> None:
    for size, dtype in ((128, "f2"), (8, "f2"), (128, "f4"), (4, "f4")):
        kernels.check_head_size(size, np.dtype(dtype))
    for size, dtype in ((96, "f2"), (256, "f2"), (4, "f2"), (20, "f4")):
        with pytest.raises(WorkbookError, match=f"this checkpoint's have {size}: leave --fast out"):
            kernels.check_head_size(size, np.dtype(dtype))
