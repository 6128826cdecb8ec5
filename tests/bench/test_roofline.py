"""Notebook 07: bounds by hand, what was kept read back, and pictures whose points are where the numbers say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from support.checkpoints import ROOT

from glmtrt_helpers.bench import results
from glmtrt_helpers.bench.plots import plot_batches, plot_bounds, plot_memory, plot_past, plot_roofline
from glmtrt_helpers.bench.results import Report, Row
from glmtrt_helpers.bench.roofline import bounds, floor_ms
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines.profiles import real_size

WEIGHTS = 12_346_572_800
LAYERS, HEAD = 28 * 12 * 4096**2, 130528 * 4096  # numbers that take part in products, of the real size


@pytest.fixture
def real(_random_master: Path) -> Checkpoint:
    return real_size(open_checkpoint(_random_master))


def row(engine: str, phase: str, batch: int, past: int, ms: float) -> Row:
    tokens = batch * (past if phase == "prefill" else 1)
    return Row(engine, phase, batch, past, "fp16", [ms], ms, 1000 * tokens / ms, 0.5)


def report(*rows: Row) -> Report:
    """A card of 4000 GB/s and 800 TFLOP/s."""
    return Report(4000.0, 800.0, WEIGHTS, list(rows))


def drawn(axis: Axes, label: str) -> tuple[list[float], list[float]]:
    """The points of the line with this label."""
    (line,) = (line for line in axis.lines if str(line.get_label()).startswith(label))
    x, y = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
    return x.tolist(), y.tolist()


def only_axis(figure: Figure) -> Axes:
    (axis,) = figure.axes
    return axis


def test_a_decode_step_by_hand(real: Checkpoint) -> None:
    """Past 1000, three rows: a token reads 2 * 28 * 1000 * 4096 numbers of each row's cache, 0.459 GB in fp16."""
    least = bounds(real, report(), "decode", 3, 1000)
    cache = 2 * 28 * 3 * 1000 * 4096 * 2
    assert least.nbytes == WEIGHTS + cache
    assert least.weights == pytest.approx(WEIGHTS / 4e12 * 1000) and least.cache == pytest.approx(cache / 4e12 * 1000)
    # Of each number of the cache one product and one sum, whether it is a key's or a value's.
    assert least.flop == 2 * 3 * (LAYERS + HEAD) + 2 * (2 * 28 * 3 * 1000 * 4096)
    assert least.products == pytest.approx(least.flop / 800e12 * 1000)
    assert least.least == pytest.approx(least.weights + least.cache) and least.bound_by == "reading the weights"


def test_a_prefill_by_hand(real: Checkpoint) -> None:
    """Every token of a prompt sees every other; the vocabulary is wanted for the last one only."""
    least = bounds(real, report(), "prefill", 2, 512)
    assert least.flop == 2 * (LAYERS * 2 * 512 + HEAD * 2) + 4 * 28 * 2 * 512 * 512 * 4096
    assert least.least == pytest.approx(least.products) and least.bound_by == "multiplying"


def test_bounds_agree_with_the_floor_of_the_benchmark(real: Checkpoint) -> None:
    for phase, batch, past in (("decode", 1, 0), ("decode", 2000, 0), ("prefill", 1, 8), ("prefill", 1, 512)):
        least = bounds(real, report(), phase, batch, past)
        attention = 4 * 28 * batch * past * past * 4096 / 800e9 if phase == "prefill" else 0
        floor = floor_ms(real, report(), phase, batch, past)
        assert max(least.weights, least.products - attention) == pytest.approx(floor)


@pytest.mark.parametrize(
    ("batch", "past", "says"),
    [(1, 2000, "reading the weights"), (64, 512, "reading the cache"), (400, 8, "multiplying")],
)
def test_what_binds(real: Checkpoint, batch: int, past: int, says: str) -> None:
    assert bounds(real, report(), "decode", batch, past).bound_by == says


def test_fp32_reads_twice_and_multiplies_half_as_fast(real: Checkpoint) -> None:
    half, full = (bounds(real, report(), "decode", 4, 512, dtype) for dtype in ("fp16", "fp32"))
    assert full.nbytes == 2 * half.nbytes and full.cache == 2 * half.cache and full.flop == half.flop
    assert full.products == pytest.approx(2 * half.products)


def test_what_the_benchmark_kept_is_read_back(_random_master: Path, tmp_path: Path) -> None:
    kept = report(row("fast", "decode", 1, 512, 4.0))
    kept.memory, kept.build = [{"engine": "fast", "bytes": 5}], [{"engine": "fast", "load_seconds": 1.0}]
    kept.missing = {"classical": "no GPU"}
    path = tmp_path / "kept.json"
    results.save(path, open_checkpoint(_random_master), kept, "glmtrt bench somewhere")
    entry = json.loads(path.read_text())
    path.write_text(json.dumps(entry | {"gpu": "a card"}))
    found, about = results.load(path)
    assert found == kept and about.startswith(f"a card, {entry['date']}, torch ")


WHOLE: dict[str, Any] = {
    "gpu": None, "date": "2026-11-23", "versions": {"torch": "2.11.0", "onnx": "1.23.1"},
    "copy_bandwidth_gb_s": 10.0, "matrix_tflop_s": 1.0, "weights_bytes": 5, "memory": [], "build": [],
    "rows": [{"engine": "fast", "phase": "decode", "batch": 1, "past": 8, "dtype": "fp16", "samples_ms": [1.0],
              "median_ms": 1.0, "tokens_per_s": 1000.0, "floor_fraction": 0.5}],
}  # fmt: skip


def test_a_run_without_a_gpu_and_without_what_was_missing(tmp_path: Path) -> None:
    (tmp_path / "kept.json").write_text(json.dumps(WHOLE))
    found, about = results.load(tmp_path / "kept.json")
    assert about == "a CPU, 2026-11-23, torch 2.11.0" and found.missing == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "is missing: measure it with `glmtrt bench DIR --output"),
        ('{"rows": [', "is not JSON"),
        ("[]", "is no whole measurement"),
        (json.dumps({k: v for k, v in WHOLE.items() if k != "weights_bytes"}), "whole measurement .'weights_bytes'."),
        (json.dumps(WHOLE | {"rows": [{"engine": "fast"}]}), "is no whole measurement"),
        (json.dumps(WHOLE | {"copy_bandwidth_gb_s": 0}), "not above zero"),
        (json.dumps(WHOLE | {"rows": [WHOLE["rows"][0] | {"median_ms": 0.0}]}), "not above zero"),
    ],
)
def test_a_missing_or_broken_file_is_one_sentence(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "kept.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(WorkbookError, match=says):
        results.load(path)


def test_points_lie_under_the_roof_where_they_were_measured(real: Checkpoint) -> None:
    figure = plot_roofline(
        real, report(row("fast", "decode", 1, 512, 4.0), row("fast", "prefill", 1, 512, 10.0)), "a card"
    )
    axis = only_axis(figure)
    for phase, ms in (("decode", 4.0), ("prefill", 10.0)):
        least = bounds(real, report(), phase, 1, 512)
        assert drawn(axis, f"fast, {phase}") == (
            [pytest.approx(least.flop / least.nbytes)], [pytest.approx(least.flop / (ms / 1000) / 1e12)]
        )  # fmt: skip
    x, y = drawn(axis, "roof")
    assert y[0] == pytest.approx(4e12 * x[0] / 1e12) and y[-1] == 800.0
    assert drawn(axis, "corner")[0] == [200.0, 200.0]
    assert axis.get_xscale() == axis.get_yscale() == "log"


def test_a_step_as_fast_as_its_bound_touches_the_roof(real: Checkpoint) -> None:
    for phase, batch, past in (("decode", 1, 2000), ("decode", 64, 512), ("prefill", 1, 1024)):
        least = bounds(real, report(), phase, batch, past)
        axis = only_axis(plot_roofline(real, report(row("fast", phase, batch, past, least.least))))
        (x,), (y,) = drawn(axis, "fast")
        assert y == pytest.approx(min(4000 * x / 1000, 800))


def test_cost_over_the_past(real: Checkpoint) -> None:
    """In the order of the past; batches and prompts are left out, and an engine far above is only named."""
    rows = [row("fast", "decode", 1, 2000, 5.0), row("fast", "decode", 1, 128, 4.0), row("fast", "decode", 8, 512, 6.0)]
    rows += [row("fast", "prefill", 1, 512, 9.0), row("torch-eager", "decode", 1, 512, 31.0)]
    axis = only_axis(plot_past(real, report(*rows), "a card"))
    assert drawn(axis, "fast") == ([128.0, 2000.0], [4.0, 5.0])
    assert drawn(axis, "torch-eager: 31, above the picture") == ([], [])
    x, y = drawn(axis, "weights and cache")
    assert y[0] == pytest.approx(WEIGHTS / 4e9) and x[-1] > 2000
    assert y[-1] == pytest.approx(bounds(real, report(), "decode", 1, int(x[-1])).least)
    assert axis.get_ylim()[0] == 0 and axis.get_ylim()[1] < 10


def test_an_engine_far_above_is_drawn_where_it_is_alone(real: Checkpoint) -> None:
    axis = only_axis(plot_past(real, report(row("torch-eager", "decode", 1, 512, 31.0))))
    assert drawn(axis, "torch-eager") == ([512.0], [31.0])


def test_tokens_a_second_over_the_batch(real: Checkpoint) -> None:
    rows = [row("fast", "decode", 8, 512, 5.0), row("fast", "decode", 1, 512, 4.0), row("fast", "decode", 1, 128, 3.9)]
    axis = only_axis(plot_batches(real, report(*rows)))
    assert drawn(axis, "fast") == ([1.0, 8.0], [250.0, 1600.0])
    x, y = drawn(axis, "bound")
    assert x[0] == 1 and x[-1] == 16
    assert y[-1] == pytest.approx(16000 / bounds(real, report(), "decode", 16, 512).least)


def test_memory_and_bounds_are_bars(real: Checkpoint) -> None:
    kept = report()
    kept.memory = [{"engine": "classical", "bytes": 15 * 10**9}, {"engine": "classical", "bytes": 13 * 10**9}]
    axis = only_axis(plot_memory(kept))
    assert [bar.get_width() for bar in axis.patches] == [15.0, 13.0]  # type: ignore[attr-defined]
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == ["classical", "classical, several rows"]
    assert drawn(axis, "weights 12.35")[0] == [WEIGHTS / 1e9] * 2

    least = bounds(real, kept, "decode", 64, 512, "fp32")
    axis = only_axis(plot_bounds(real, kept, "decode", 64, 512, "fp32"))
    bars = [(bar.get_x(), bar.get_width()) for bar in axis.patches]  # type: ignore[attr-defined]
    assert bars == [(0, least.weights), (least.weights, least.cache), (0, least.products)]
    assert "decode, batch 64, 512 tokens, fp32: bound by reading the cache" in axis.get_title(loc="left")


def test_the_committed_measurement_is_of_the_real_size(real: Checkpoint) -> None:
    """No step in it is faster than its bytes at the bandwidth that was measured beside it."""
    kept, about = results.load(ROOT / "benchmarks" / "h200.json")
    assert kept.weights_bytes == WEIGHTS and "H200" in about
    assert {"torch-eager", "torch-graph", "classical", "fast"} <= {each.engine for each in kept.rows}
    for each in kept.rows:
        assert each.median_ms > bounds(real, kept, each.phase, each.batch, each.past, each.dtype).least, each
