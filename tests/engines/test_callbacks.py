"""What the progress monitor notes of a build."""

import itertools
import types

import pytest

from glmtrt_helpers.engines import callbacks
from glmtrt_helpers.engines.plots import draw_phases

TRT = types.SimpleNamespace(IProgressMonitor=object)


def test_the_phases_of_a_build_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own seconds, without those of the phases inside it; one that runs again adds to them."""
    clock = itertools.count()
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: float(next(clock)))
    monitor = callbacks.make_monitor(TRT, lambda *_: None)
    monitor.phase_start("building", None, 3)  # at 0
    for _ in range(2):
        monitor.phase_start("costs", "building", 1)
        monitor.phase_start("timing", "costs", 5)
        monitor.phase_finish("timing")
        monitor.phase_finish("costs")
    monitor.phase_finish("building")  # at 9
    assert monitor.phases == {"building": (3.0, 3), "costs": (4.0, 2), "timing": (2.0, 10)}
    (axis,) = draw_phases(monitor.phases).axes
    assert sum(bar.get_width() for bar in axis.patches) == 9
    assert "timing (10 steps)" in [label.get_text() for label in axis.get_yticklabels()]
