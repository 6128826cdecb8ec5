"""The bounds of a step by hand, and against the committed measurement."""

from pathlib import Path

import pytest
from support.checkpoints import ROOT

from glmtrt_helpers.bench import results
from glmtrt_helpers.bench.results import Report
from glmtrt_helpers.bench.roofline import bounds, floor_ms
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.engines.profiles import real_size

WEIGHTS = 12_346_572_800
LAYERS, HEAD = 28 * 12 * 4096**2, 130528 * 4096  # weights of the linear layers at the real size
CARD = Report(4000.0, 800.0, WEIGHTS)  # GB/s, TFLOP/s


@pytest.fixture
def real(_random_master: Path) -> Checkpoint:
    return real_size(open_checkpoint(_random_master))


def test_a_decode_step_by_hand(real: Checkpoint) -> None:
    """Past 1000, three rows: a step reads 2 * 28 * 1000 * 4096 numbers of each row's cache, 0.459 GB in fp16."""
    least = bounds(real, CARD, "decode", 3, 1000)
    cache = 2 * 28 * 3 * 1000 * 4096 * 2
    assert least.nbytes == WEIGHTS + cache
    assert least.weights == pytest.approx(WEIGHTS / 4e12 * 1000) and least.cache == pytest.approx(cache / 4e12 * 1000)
    # Each number of the cache, key or value, is multiplied once and added once.
    assert least.flop == 2 * 3 * (LAYERS + HEAD) + 2 * (2 * 28 * 3 * 1000 * 4096)
    assert least.matmuls == pytest.approx(least.flop / 800e12 * 1000)
    assert least.least == pytest.approx(least.weights + least.cache) and least.bound_by == "reading the weights"


def test_a_prefill_by_hand(real: Checkpoint) -> None:
    """Every token of a prompt attends to all; only the last one needs logits."""
    least = bounds(real, CARD, "prefill", 2, 512)
    assert least.flop == 2 * (LAYERS * 2 * 512 + HEAD * 2) + 4 * 28 * 2 * 512 * 512 * 4096
    assert least.least == pytest.approx(least.matmuls) and least.bound_by == "matmuls"


def test_floors_by_hand(real: Checkpoint) -> None:
    """The real size on a card of 4300 GB/s and 450 TFLOP/s: 12.35 GB a token; 12.9 GFLOP for each token of a prompt."""
    report = Report(4300.0, 450.0, WEIGHTS)
    assert floor_ms(real, report, "decode", 1, 512) == pytest.approx(2.871, rel=1e-3)
    assert floor_ms(real, report, "decode", 64, 512) == pytest.approx(2.871, rel=1e-3)
    assert floor_ms(real, report, "prefill", 1, 512) == pytest.approx(
        2 * (512 * LAYERS + HEAD) / 450e12 * 1000, rel=1e-6
    )
    assert floor_ms(real, report, "prefill", 1, 8) == pytest.approx(2.871, rel=1e-3)


def test_bounds_agree_with_the_floor(real: Checkpoint) -> None:
    for phase, batch, past in (("decode", 1, 0), ("decode", 2000, 0), ("prefill", 1, 8), ("prefill", 1, 512)):
        least = bounds(real, CARD, phase, batch, past)
        attention = 4 * 28 * batch * past * past * 4096 / 800e9 if phase == "prefill" else 0
        floor = floor_ms(real, CARD, phase, batch, past)
        assert max(least.weights, least.matmuls - attention) == pytest.approx(floor)


@pytest.mark.parametrize(
    ("batch", "past", "bound_by"),
    [(1, 2000, "reading the weights"), (64, 512, "reading the cache"), (400, 8, "matmuls")],
)
def test_what_a_decode_step_is_bound_by(real: Checkpoint, batch: int, past: int, bound_by: str) -> None:
    assert bounds(real, CARD, "decode", batch, past).bound_by == bound_by


def test_fp32_reads_twice_and_computes_half_as_fast(real: Checkpoint) -> None:
    half, full = (bounds(real, CARD, "decode", 4, 512, dtype) for dtype in ("fp16", "fp32"))
    assert full.nbytes == 2 * half.nbytes and full.cache == 2 * half.cache and full.flop == half.flop
    assert full.matmuls == pytest.approx(2 * half.matmuls)


def test_the_committed_measurement_is_of_the_real_size(real: Checkpoint) -> None:
    """No step in it is faster than its bound at the rates of the same run."""
    measured, about = results.load(ROOT / "benchmarks" / "h100.json")
    assert measured.weights_bytes == WEIGHTS and "H100" in about
    assert {"torch-eager", "torch-graph", "classical", "cuda"} <= {each.engine for each in measured.rows}
    for each in measured.rows:
        assert each.median_ms > bounds(real, measured, each.phase, each.batch, each.past, each.dtype).least, each
