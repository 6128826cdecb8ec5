"""Traces: what a profiler wrote, cut into steps, and how long nothing ran."""

import json
from pathlib import Path

import pytest

from glmtrt_helpers.bench import kernel_trace
from glmtrt_helpers.bench.kernel_trace import Kernel
from glmtrt_helpers.core.errors import WorkbookError


def test_only_what_ran_on_the_gpu_is_read_in_order_of_time(tmp_path: Path) -> None:
    events = [
        {"cat": "kernel", "name": "attend", "ts": 107.5, "dur": 4.0},
        {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 90.0, "dur": 50.0},
        {"cat": "gpu_memcpy", "name": "Memcpy", "ts": 100.0, "dur": 1.5},
        {"name": "process_name", "ph": "M"},
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    assert kernel_trace.read(tmp_path / "trace.json") == [Kernel("Memcpy", 0.0, 1.5), Kernel("attend", 7.5, 4.0)]


def test_runs_are_equal_or_refused() -> None:
    kernels = [Kernel("a", n * 2.0, 1.0) for n in range(6)]
    assert kernel_trace.split(kernels, 3) == [kernels[:2], kernels[2:4], kernels[4:]]
    for steps in (4, 7):
        with pytest.raises(WorkbookError, match=f"6 kernels are not {steps} equal runs"):
            kernel_trace.split(kernels, steps)


def test_idle_is_what_no_kernel_covers() -> None:
    """Steps of 10 us: kernels of 0 to 4 and 3 to 8, so that 2 of 10 are idle; what overlaps counts once."""
    runs = [[Kernel("a", start, 4.0), Kernel("b", start + 3, 5.0)] for start in (0.0, 10.0, 20.0)]
    assert kernel_trace.idle_fraction(runs) == pytest.approx(0.2)
    made = kernel_trace.entry("fast", "decode", 1, 512, runs)
    assert made["kernels"] == [
        {"name": "a", "start_us": 0.0, "duration_us": 4.0},
        {"name": "b", "start_us": 3.0, "duration_us": 5.0},
    ]
    assert made["idle_fraction"] == 0.2 and made["past"] == 512


def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(WorkbookError, match="a trace needs an NVIDIA GPU"):
        kernel_trace.record_kernels(lambda: None)
