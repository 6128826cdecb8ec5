"""The plot of GPU memory draws cards at the size that they have."""

import pytest

from glmtrt_helpers.engines.memory_prediction import EngineMemory
from glmtrt_helpers.engines.plots import draw_memory


def test_a_card_of_16_gb_has_16_times_two_to_the_30_bytes() -> None:
    (axis,) = draw_memory(EngineMemory(12_000_000_000, 4_000_000_000, 500_000_000, 100_000_000)).axes
    cards = {text.get_text(): text.xy[0] for text in axis.texts}  # type: ignore[attr-defined]
    assert cards["16 GB card"] == pytest.approx(17.18, abs=0.01) and len(cards) == 4
    assert [line.get_xdata()[0] for line in axis.lines] == list(cards.values())
    assert axis.get_xlim()[1] > max(cards.values())
