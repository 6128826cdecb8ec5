"""Pictures of measurements: their points are where the numbers say."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from glmtrt_helpers.bench.plots import plot_batches, plot_bounds, plot_memory, plot_past, plot_roofline, plot_usage
from glmtrt_helpers.bench.results import Report, Row
from glmtrt_helpers.bench.roofline import bounds
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.core.processes import Sample, Usage
from glmtrt_helpers.engines.profiles import real_size

WEIGHTS = 12_346_572_800


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


def test_points_lie_under_the_roof_where_they_were_measured(real: Checkpoint) -> None:
    figure = plot_roofline(
        real, report(row("cuda", "decode", 1, 512, 4.0), row("cuda", "prefill", 1, 512, 10.0)), "a card"
    )
    axis = only_axis(figure)
    for phase, ms in (("decode", 4.0), ("prefill", 10.0)):
        least = bounds(real, report(), phase, 1, 512)
        assert drawn(axis, f"cuda, {phase}") == (
            [pytest.approx(least.flop / least.nbytes)], [pytest.approx(least.flop / (ms / 1000) / 1e12)]
        )  # fmt: skip
    x, y = drawn(axis, "roof")
    assert y[0] == pytest.approx(4e12 * x[0] / 1e12) and y[-1] == 800.0
    assert drawn(axis, "ridge")[0] == [200.0, 200.0]
    assert axis.get_xscale() == axis.get_yscale() == "log"


def test_a_step_as_fast_as_its_bound_touches_the_roof(real: Checkpoint) -> None:
    for phase, batch, past in (("decode", 1, 2000), ("decode", 64, 512), ("prefill", 1, 1024)):
        least = bounds(real, report(), phase, batch, past)
        axis = only_axis(plot_roofline(real, report(row("cuda", phase, batch, past, least.least))))
        (x,), (y,) = drawn(axis, "cuda")
        assert y == pytest.approx(min(4000 * x / 1000, 800))


def test_decode_over_the_past(real: Checkpoint) -> None:
    """In the order of the past, without batches and prompts; an engine far above is only in the legend."""
    rows = [row("cuda", "decode", 1, 2000, 5.0), row("cuda", "decode", 1, 128, 4.0), row("cuda", "decode", 8, 512, 6.0)]
    rows += [row("cuda", "prefill", 1, 512, 9.0), row("torch-eager", "decode", 1, 512, 31.0)]
    axis = only_axis(plot_past(real, report(*rows), "a card"))
    assert drawn(axis, "cuda") == ([128.0, 2000.0], [4.0, 5.0])
    assert drawn(axis, "torch-eager: 31, above the picture") == ([], [])
    x, y = drawn(axis, "weights and cache")
    assert y[0] == pytest.approx(WEIGHTS / 4e9) and x[-1] > 2000
    assert y[-1] == pytest.approx(bounds(real, report(), "decode", 1, int(x[-1])).least)
    assert axis.get_ylim()[0] == 0 and axis.get_ylim()[1] < 10


def test_an_engine_far_above_is_drawn_where_it_is_alone(real: Checkpoint) -> None:
    axis = only_axis(plot_past(real, report(row("torch-eager", "decode", 1, 512, 31.0))))
    assert drawn(axis, "torch-eager") == ([512.0], [31.0])


def test_tokens_per_second_over_the_batch(real: Checkpoint) -> None:
    rows = [row("cuda", "decode", 8, 512, 5.0), row("cuda", "decode", 1, 512, 4.0), row("cuda", "decode", 1, 128, 3.9)]
    axis = only_axis(plot_batches(real, report(*rows)))
    assert drawn(axis, "cuda") == ([1.0, 8.0], [250.0, 1600.0])
    x, y = drawn(axis, "bound")
    assert x[0] == 1 and x[-1] == 16
    assert y[-1] == pytest.approx(16000 / bounds(real, report(), "decode", 16, 512).least)


def test_memory_and_bounds_are_bars(real: Checkpoint) -> None:
    run = report()
    run.memory = [{"engine": "classical", "bytes": 15 * 10**9}, {"engine": "cuda", "bytes": 13 * 10**9}]
    axis = only_axis(plot_memory(run))
    assert [bar.get_width() for bar in axis.patches] == [15.0, 13.0]  # type: ignore[attr-defined]
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == ["classical", "cuda"]
    assert drawn(axis, "weights 12.35")[0] == [WEIGHTS / 1e9] * 2

    least = bounds(real, run, "decode", 64, 512, "fp32")
    axis = only_axis(plot_bounds(real, run, "decode", 64, 512, "fp32"))
    bars = [(bar.get_x(), bar.get_width()) for bar in axis.patches]  # type: ignore[attr-defined]
    assert bars == [(0, least.weights), (least.weights, least.cache), (0, least.matmuls)]
    assert "decode, batch 64, 512 tokens, fp32: bound by reading the cache" in axis.get_title(loc="left")


def test_memory_over_time() -> None:
    """Anonymous and file-backed memory stacked, a line at each phase, one picture for each command."""
    samples = [Sample(0.0, 10**9, 0), Sample(2.0, 3 * 10**9, 10**9)]
    usage = Usage(0, 2.0, samples, [(0.0, "loading"), (1.0, "tracing")])
    figure = plot_usage({"one": usage, "other": usage}, 2 * 10**9, 10**9)
    first, second = figure.axes
    assert first.get_title(loc="left") == "one: at most 3.00 GB anonymous"
    assert [text.get_text() for text in second.texts] == ["loading", "tracing"]
    assert [area.get_datalim(first.transData).y1 for area in first.collections] == [3.0, 4.0]
    # The weights stand on what the command takes without them.
    assert drawn(first, "without weights")[1] == [1.0, 1.0]
    assert drawn(second, "and the weights once")[1] == [3.0, 3.0]
