"""Statuses of CUDA calls become sentences; buffers of one allocation are aligned and do not overlap."""

import itertools

import pytest
from cuda.bindings import driver, nvrtc
from cuda.bindings import runtime as cudart

from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines import cuda


def test_a_failed_call_is_one_sentence() -> None:
    with pytest.raises(WorkbookError, match=r"not enough memory to hold the cache.*take fewer rows or tokens"):
        cuda.check((cudart.cudaError_t.cudaErrorMemoryAllocation, 0), "hold the cache")
    with pytest.raises(WorkbookError, match=r"CUDA could not copy an input: .*\(cudaErrorInvalidValue\)"):
        cuda.check((cudart.cudaError_t.cudaErrorInvalidValue,), "copy an input")
    assert cuda.check((cudart.cudaError_t.cudaSuccess, 5), "count") == 5
    assert cuda.check((cudart.cudaError_t.cudaSuccess, 5, 6), "count") == (5, 6)


@pytest.mark.parametrize("status", [nvrtc.nvrtcResult(2), driver.CUresult(209)])
def test_a_status_of_nvrtc_or_the_driver_is_not_read_as_the_runtimes(status: int) -> None:
    """NVRTC's 2 means that no program could be created; the runtime's is out of memory."""
    with pytest.raises(WorkbookError, match=rf"CUDA could not compile it \({status.name}\); see"):  # type: ignore[attr-defined]
        cuda.check((status,), "compile it")


def test_buffers_in_one_allocation_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudart, "cudaMalloc", lambda nbytes: (cudart.cudaError_t.cudaSuccess, 1 << 20))
    sizes = {"a": 0, "b": 1, "c": 256, "d": 1000}
    memory = cuda.DeviceMemory(sum(map(cuda.aligned, sizes.values())), "test")
    buffers = list(memory.divide(sizes).values())
    assert all(buffer.address % cuda.ALIGNMENT == 0 and buffer.address > 0 for buffer in buffers)
    for before, after in itertools.pairwise(buffers):
        assert before.address + max(before.nbytes, 1) <= after.address


@pytest.mark.parametrize(("tokens", "nbytes"), [(0, 2), (1, 128), (3, 128), (5, 100), (7, 8192), (9, 6)])
def test_aligned_tokens_are_the_fewest_that_end_aligned(tokens: int, nbytes: int) -> None:
    count = cuda.aligned_tokens(tokens, nbytes)
    fewest = next(n for n in itertools.count(tokens) if n * nbytes % cuda.ALIGNMENT == 0)
    assert count == fewest
